"""Adapters select the targets of some images of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.adapters import classifier, torchvision
from fxprune.adapters.protocol import Batch, select_items
from fxprune.adapters.ultralytics import tasks as ultralytics
from tests.helpers.models import pixels

BOXES = 4
"""As many boxes as images: the number of rows does not say what a row is of."""


class Network(nn.Module):
    def __init__(self, **args: Any) -> None:
        super().__init__()
        self.args = args or None


def yolo_targets(index: Sequence[float]) -> dict[str, Any]:
    numbers = torch.arange(BOXES).float()
    return {
        "img": pixels(4, 3, 8, 8),
        "cls": numbers[:, None],
        "bboxes": numbers[:, None].expand(BOXES, 4),
        "batch_idx": torch.tensor(index),
        "masks": numbers[:, None, None].expand(BOXES, 2, 2),
        "im_file": ["a", "b", "c", "d"],
        "ratio": 2.0,
    }


@pytest.mark.parametrize("numbers", [range(1, 3), [1, 2]])
def test_ultralytics_targets_follow_their_images(numbers: Sequence[int]) -> None:
    targets = yolo_targets([2.0, 0.0, 2.0, 1.0])
    found = ultralytics.select_targets(Network(), Batch(targets["img"], targets, 4), numbers)
    assert found["batch_idx"].tolist() == [0, 1, 1]
    assert found["cls"][:, 0].tolist() == [3, 0, 2]
    assert found["bboxes"][:, 0].tolist() == [3, 0, 2]
    assert found["masks"][:, 0, 0].tolist() == [1, 2]  # one map per image
    assert found["im_file"] == ["b", "c"]
    assert found["ratio"] == 2.0
    assert torch.equal(found["img"], targets["img"][1:3])


def test_ultralytics_masks_are_rows_of_boxes_unless_they_overlap() -> None:
    class Args:
        overlap_mask = False

    network = Network()
    network.args = Args()  # type: ignore[assignment]
    targets = yolo_targets([2.0, 0.0, 2.0, 1.0])
    found = ultralytics.select_targets(network, Batch(targets["img"], targets, 4), [2])
    assert found["masks"][:, 0, 0].tolist() == [0, 2]


def test_ultralytics_targets_of_an_image_without_boxes_are_empty() -> None:
    targets = yolo_targets([2.0, 0.0, 2.0, 0.0])
    found = ultralytics.select_targets(Network(), Batch(targets["img"], targets, 4), [1])
    assert [len(found[key]) for key in ("cls", "bboxes", "batch_idx", "img")] == [0, 0, 0, 1]


def test_targets_of_detectors_and_classifiers_follow_their_images() -> None:
    rows = [{"labels": torch.tensor([number])} for number in range(4)]
    batch = Batch(list(pixels(4, 3, 8, 8)), rows, 4)
    assert torchvision.ADAPTER.select_targets(Network(), batch, [3, 1]) == [rows[3], rows[1]]
    labels = Batch(pixels(4, 3, 8, 8), torch.arange(4), 4)
    found: Tensor = classifier.ADAPTER.select_targets(Network(), labels, range(1, 4))
    assert found.tolist() == [1, 2, 3]


def test_select_items_of_a_range_gives_a_view() -> None:
    values = pixels(4, 2)
    assert select_items(values, range(1, 3)).data_ptr() == values[1].data_ptr()
    assert torch.equal(select_items(values, [3, 0]), values[[3, 0]])
