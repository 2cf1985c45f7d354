"""Labelled batches of two images, of any size, in the form that each family of models takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def classified(height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, height, width), torch.tensor([1, 3])


def boxed(height: int, width: int, **extra: Callable[[], Any]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 50.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    sizes = ((height, width), (width, height))
    images = [torch.rand(3, *size) for size in sizes]
    return images, [{**target, **{key: make() for key, make in extra.items()}} for _ in images]


def masked(height: int, width: int) -> Any:
    images, targets = boxed(height, width)
    for image, target in zip(images, targets, strict=True):
        target["masks"] = torch.ones(2, *image.shape[-2:], dtype=torch.uint8)
    return images, targets


def keyed(height: int, width: int) -> Any:
    return boxed(height, width, keypoints=lambda: torch.tensor([[[20.0, 20.0, 1.0]] * 17] * 2))


def batched(height: int, width: int) -> dict[str, Tensor]:
    return {
        "img": torch.rand(2, 3, height, width),
        "cls": torch.tensor([[1.0], [2.0], [3.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.5]] * 3),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
    }
