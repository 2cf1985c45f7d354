"""How much of what a model finds its pruned version still finds: boxes, classes, and models that give neither."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Agreement, BatchError, ModelError
from fxprune.datasets.agreement import compare_outputs
from fxprune.datasets.evaluation import Boxes, make_boxes
from fxprune.demo.bundled import load_dataset, load_detector
from tests.helpers.hostile import assert_unchanged
from tests.helpers.models import build, labelled, pixels, tiny

SQUARE = [0.0, 0.0, 10.0, 10.0]


def boxes(*rows: tuple[list[float], int, float]) -> Boxes:
    corners, labels, scores = ([row[place] for row in rows] for place in range(3))
    return make_boxes(torch.tensor(corners), torch.tensor(labels), torch.tensor(scores))


@pytest.mark.parametrize(
    ("found", "again"),
    [
        ([(SQUARE, 1, 0.9)], 1),
        ([(SQUARE, 1, 0.46)], 1),
        ([(SQUARE, 1, 0.44)], 0),  # less than half as sure
        ([(SQUARE, 2, 0.9)], 0),  # another class
        ([([0.0, 0.0, 10.0, 5.1], 1, 0.9)], 1),
        ([([0.0, 0.0, 10.0, 4.9], 1, 0.9)], 0),  # an IoU of .49
        ([([20.0, 20.0, 30.0, 30.0], 1, 0.9), (SQUARE, 1, 0.9)], 1),
    ],
)
def test_box_is_found_again_by_class_overlap_and_score(found: list[Any], again: int) -> None:
    agreed = compare_outputs([[boxes((SQUARE, 1, 0.9))]], [[boxes(*found)]])
    assert (agreed.share, agreed.boxes, agreed.images) == (again, 1, 1)


def test_one_box_finds_one_box_again_and_unsure_boxes_do_not_count() -> None:
    twice = boxes((SQUARE, 1, 0.9), ([0.0, 0.0, 10.0, 9.0], 1, 0.8), ([50.0, 0.0, 60.0, 9.0], 1, 0.3))
    agreed = compare_outputs([[twice]], [[boxes((SQUARE, 1, 0.9))]])
    assert (agreed.share, agreed.boxes) == (0.5, 2)


def test_classes_agree_where_they_are_equal() -> None:
    agreed = compare_outputs([torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([1, 0]), torch.tensor([3])])
    assert agreed == Agreement(2 / 3, 3)
    assert str(agreed) == "same class for 66.7% of 3 images"


def test_agreement_of_a_detector_with_itself_is_one_and_falls_with_pruning() -> None:
    model = load_detector()
    batches = fxprune.batches(model, load_dataset("val"), batch_size=4)[:2]
    plan = fxprune.analyze(model, batches).plan(0.4)
    with assert_unchanged(model):
        same, less = (fxprune.agreement(model, other, batches) for other in (model, fxprune.apply(model, plan)))
    assert (same.share, same.mAP, same.images) == (1, 1, 8)
    assert less.boxes == same.boxes
    assert less.share < 1
    assert less.mAP is not None
    assert less.mAP < 0.9
    assert str(same) == f"100.0% of {same.boxes} boxes found again in 8 images; mAP 1.000 with the unpruned model's" + (
        " boxes as truth"
    )


def test_agreement_of_a_classifier_counts_images_of_the_same_class() -> None:
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.fc.weight.zero_()  # type: ignore[union-attr, operator]
        other.fc.bias.copy_(torch.eye(5)[3])  # type: ignore[union-attr, operator]
    images = [pixels(3, 3, 16, 16, seed=seed) for seed in range(2)]
    own = torch.cat([model(batch).argmax(1) for batch in images])
    assert fxprune.agreement(model, model, iter(images)) == Agreement(1, 6)
    assert fxprune.agreement(model, other, labelled(3)).share == float((own == 3).double().mean())


def test_agreement_takes_yolo_objects_and_the_boxes_of_segmentation_models() -> None:
    models: Any = pytest.importorskip("ultralytics.nn.tasks")
    torch.manual_seed(0)
    model = models.SegmentationModel("yolov8n-seg.yaml", nc=3, verbose=False).eval()
    agreed = fxprune.agreement(model, model, [{"img": pixels(2, 3, 64, 64)}])
    assert (agreed.share, agreed.images) == (1, 2)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_agreement_of_another_model_is_refused_with_what_to_use() -> None:
    with pytest.raises(ModelError, match="not logits"):
        fxprune.agreement(build(Pair), build(Pair), [pixels(2, 3, 8, 8)])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images yielded no batch"),
        (pixels(2, 3, 16, 16), "images must be an iterable of batches, got Tensor; a single batch goes in a list"),
        ([[torch.zeros(3, 160, 160)]], "finds no box in any of 1 images"),
    ],
)
def test_agreement_without_anything_to_compare_is_refused(images: Any, message: str) -> None:
    model = load_detector()
    with assert_unchanged(model), pytest.raises(BatchError, match=message):
        fxprune.agreement(model, copy.deepcopy(model), images)


def test_nan_boxes_are_not_found() -> None:
    model, broken = load_detector(), load_detector()
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(np.nan)
    batch = [load_dataset("val")[index][0] for index in range(2)]
    assert fxprune.agreement(model, broken, [batch]).share == 0
