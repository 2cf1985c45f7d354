"""Average precision against values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import BatchError
from fxprune.evaluation import evaluate


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


def test_a_perfect_detector_has_precision_one() -> None:
    data = [item((0, 0, 50, 50)), item((10, 10, 90, 90), (0, 0, 8, 8))]
    outputs = [found(target["boxes"], [0.9] * len(target["boxes"])) for _, target in data]
    scores = evaluate(Oracle(outputs), data, batch_size=1)
    assert scores["mAP"] == scores["mAP50"] == pytest.approx(1.0)


def test_average_precision_by_hand() -> None:
    # Two true boxes. By score: a hit, a false alarm, a hit: precisions 1, 1/2, 2/3 at recalls 1/2, 1/2, 1.
    # Interpolated at 101 recalls: 51 of them (0 to .50) at 1, 50 at 2/3.
    data = [item((0, 0, 40, 40), (50, 50, 90, 90))]
    outputs = [found(boxes((0, 0, 40, 40), (0, 60, 30, 90), (50, 50, 90, 90)), [0.9, 0.8, 0.7])]
    expected = (51 * 1.0 + 50 * 2 / 3) / 101
    assert evaluate(Oracle(outputs), data)["mAP50"] == pytest.approx(expected, abs=1e-6)


def test_overlap_decides_at_which_threshold_a_box_counts() -> None:
    # Intersection over union .72: a hit at .50, .55, .60, .65, .70 and none above: mAP = 5/10.
    scores = evaluate(Oracle([found(boxes((0, 0, 72, 100)), [0.9])]), [item((0, 0, 100, 100))])
    assert scores["mAP"] == pytest.approx(0.5)
    assert scores["mAP75"] == 0


def test_nothing_found_and_images_without_boxes() -> None:
    data = [item((0, 0, 40, 40)), item()]
    scores = evaluate(Oracle([found(boxes(), []), found(boxes(), [])]), data)
    assert scores["mAP"] == scores["mAP50"] == 0


def test_no_true_box_at_all_is_refused() -> None:
    with pytest.raises(BatchError, match="has a true box"):
        evaluate(Oracle([found(boxes(), [])]), [item()])


def test_the_mode_is_restored_and_progress_told() -> None:
    model = Oracle([found(boxes(), [])] * 3).train()
    model.layer.eval()
    seen: list[int] = []
    evaluate(model, [item((0, 0, 9, 9))] * 3, batch_size=2, progress=seen.append)
    assert seen == [2, 3]
    assert model.training
    assert not model.layer.training
