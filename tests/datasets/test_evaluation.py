"""Average precision against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from fxprune.datasets.evaluation import evaluate
from fxprune.demo.bundled import load_dataset
from fxprune.errors import BatchError, ModelError, SettingError


class Oracle(nn.Module):
    """Returns prepared detections, in order, whatever the images show."""

    def __init__(self, outputs: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.outputs, self.next, self.layer = outputs, 0, nn.Linear(1, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        start, self.next = self.next, self.next + len(images)
        return self.outputs[start : self.next]


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def item(*rows: tuple[float, float, float, float]) -> tuple[Tensor, dict[str, Any]]:
    return torch.zeros(3, 100, 100), {"boxes": boxes(*rows), "labels": torch.ones(len(rows), dtype=torch.int64)}


def found(corners: Tensor, scores: list[float]) -> dict[str, Tensor]:
    return {
        "boxes": corners,
        "labels": torch.ones(len(corners), dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def test_perfect_detector_has_precision_one() -> None:
    data = [item((0, 0, 50, 50)), item((10, 10, 90, 90), (0, 0, 8, 8))]
    outputs = [found(target["boxes"], [0.9] * len(target["boxes"])) for _, target in data]
    scores = evaluate(Oracle(outputs), data, batch_size=1)
    assert scores["mAP"] == scores["mAP50"] == pytest.approx(1.0)


def test_average_precision_equals_value_by_hand() -> None:
    # Two true boxes. By score: a hit, a false alarm, a hit: precisions 1, 1/2, 2/3 at recalls 1/2, 1/2, 1.
    # Interpolated at 101 recalls: 51 of them (0 to .50) at 1, 50 at 2/3.
    data = [item((0, 0, 40, 40), (50, 50, 90, 90))]
    outputs = [found(boxes((0, 0, 40, 40), (0, 60, 30, 90), (50, 50, 90, 90)), [0.9, 0.8, 0.7])]
    expected = (51 * 1.0 + 50 * 2 / 3) / 101
    assert evaluate(Oracle(outputs), data)["mAP50"] == pytest.approx(expected, abs=1e-6)


def test_overlap_decides_which_thresholds_a_box_passes() -> None:
    # Intersection over union .72: a hit at .50, .55, .60, .65, .70 and none above: mAP = 5/10.
    scores = evaluate(Oracle([found(boxes((0, 0, 72, 100)), [0.9])]), [item((0, 0, 100, 100))])
    assert scores["mAP"] == pytest.approx(0.5)
    assert scores["mAP75"] == 0


def test_no_detections_and_images_without_boxes_give_zero() -> None:
    data = [item((0, 0, 40, 40)), item()]
    scores = evaluate(Oracle([found(boxes(), []), found(boxes(), [])]), data)
    assert scores["mAP"] == scores["mAP50"] == 0


def test_evaluate_without_true_boxes_is_refused() -> None:
    with pytest.raises(BatchError, match="has a true box"):
        evaluate(Oracle([found(boxes(), [])]), [item()])


def test_evaluate_restores_the_mode_and_reports_progress() -> None:
    model = Oracle([found(boxes(), [])] * 3).train()
    model.layer.eval()
    seen: list[int] = []
    evaluate(model, [item((0, 0, 9, 9))] * 3, batch_size=2, progress=seen.append)
    assert seen == [2, 3]
    assert model.training
    assert not model.layer.training


class Data(list[Any]):
    """Items with named labels."""

    def __init__(self, items: list[Any], categories: dict[int, str]) -> None:
        super().__init__(items)
        self.categories = categories


def test_detections_inside_a_crowd_are_ignored() -> None:
    # By score: a hit, one inside the crowd, a false alarm, a hit. With the crowd ignored: precisions 1, 1/2, 2/3.
    image, target = item((0, 0, 20, 20), (30, 0, 50, 20), (0, 50, 100, 100))
    rows = boxes((0, 0, 20, 20), (10, 60, 40, 90), (70, 10, 90, 30), (30, 0, 50, 20))
    outputs = [found(rows, [0.9, 0.8, 0.7, 0.6])]
    crowd = target | {"iscrowd": torch.tensor([0, 0, 1])}
    assert evaluate(Oracle(outputs), [(image, crowd)])["mAP50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)
    # Taken as an object, the crowd is missed and the box in it is a false alarm: precisions 1, 1/2 (4 found, 2 right)
    # at recalls 1/3, 2/3: 34 recalls (0 to .33) at 1, 33 at 1/2, the rest at 0.
    assert evaluate(Oracle(outputs), [(image, target)])["mAP50"] == pytest.approx((34 + 33 / 2) / 101, abs=1e-6)
    with pytest.raises(BatchError, match="crowds aside"):
        evaluate(Oracle(outputs), [(image, target | {"iscrowd": torch.ones(3)})])


def test_given_areas_decide_the_size_class() -> None:
    image, target = item((0, 0, 50, 50))
    outputs = [found(target["boxes"], [0.9])]
    scores = evaluate(Oracle(outputs), [(image, target)])
    assert math.isnan(scores["mAP_small"])  # 2500 pixels are medium
    scores = evaluate(Oracle(outputs), [(image, target | {"area": torch.tensor([900.0])})])
    assert scores["mAP_small"] == pytest.approx(1.0)  # the outline's are not
    assert math.isnan(scores["mAP_medium"])
    with pytest.raises(BatchError, match=r"Item 0 .*area of shape"):
        evaluate(Oracle(outputs), [(image, target | {"area": torch.ones(2)})])


def test_classes_are_mapped_to_labels() -> None:
    image, target = item((0, 0, 20, 20), (50, 50, 90, 90))
    target["labels"] = torch.tensor([30, 20])
    output = found(boxes((0, 0, 20, 20), (0, 60, 20, 80), (50, 50, 90, 90)), [0.8, 0.9, 0.9])
    output["labels"] = torch.tensor([2, 0, 1])
    data = Data([(image, target)], {20: "cat", 30: "dog"})
    model = Oracle([output])
    assert evaluate(model, data, labels={2: 30, 1: 20})["mAP"] == pytest.approx(1.0)  # class 0 is dropped
    # With class 0 as a dog, its false alarm comes before the dog: half of the mean over two labels.
    scores = evaluate(Oracle([output]), data, labels={2: 30, 1: 20, 0: 30})
    assert scores["mAP"] == pytest.approx((1 + 1 / 2) / 2)
    assert evaluate(Oracle([output]), data)["mAP"] == 0  # the model names nothing: numbers are taken as they are
    named = Oracle([output])
    named.names = {0: "bird", 1: "cat", 2: "dog"}  # type: ignore[assignment]
    assert evaluate(named, data)["mAP"] == pytest.approx(1.0)
    named.names = {0: "bird", 1: "cat", 2: "hound"}  # type: ignore[assignment]
    with pytest.raises(SettingError, match=r"no class .*{30: 'dog'}.*labels="):
        evaluate(named, data)
    for labels, message in (({0: 7}, "label 7"), ({5: 20}, "class 5"), ([20, 30], "should be a dict")):
        with pytest.raises(SettingError, match=message):
            evaluate(named, data, labels=labels)  # type: ignore[arg-type]


def test_evaluate_of_a_model_without_boxes_is_refused() -> None:
    with pytest.raises(ModelError, match=r"ResNet .*boxes"):
        evaluate(resnet18(), [item((0, 0, 9, 9))])
    with pytest.raises(ModelError, match=r"Sequential .*TypeError.*takes a list"):
        evaluate(nn.Sequential(nn.Conv2d(3, 1, 1)), [item((0, 0, 9, 9))])
    with pytest.raises(ModelError, match=r"Identity .*a list of 1"):
        evaluate(nn.Identity(), [item((0, 0, 9, 9))])
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module"):
        evaluate("yolov8n.pt", [item((0, 0, 9, 9))])  # type: ignore[arg-type]


def test_evaluate_of_true_boxes_of_the_bundled_data_gives_one() -> None:
    data = load_dataset("val")
    outputs = [target | {"scores": torch.ones(len(target["labels"]))} for _, target in data]
    scores = evaluate(Oracle(outputs), data)
    assert scores["mAP"] == pytest.approx(1.0)
    assert scores["mAR"] == pytest.approx(1.0)
