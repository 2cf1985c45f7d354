"""A small detector with its images, which benchmarks take in a second."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.subjects import Items, Subject

needs_peer = pytest.mark.skipif(find_spec("torch_pruning") is None, reason="torch_pruning is in the bench extra only")

Target = dict[str, Tensor]


class Residual(nn.Module):
    """A block that an identity can stand in for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Tiny(nn.Module):
    """A detector of torchvision's convention that finds one box an image."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        stem = (nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.backbone = nn.Sequential(*stem, *(Residual(width) for _ in range(3)))
        self.tower, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 5, 1)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        batch = torch.stack(images)
        values = self.head(self.tower(self.backbone(batch)).relu()).mean((2, 3)).sigmoid()
        boxes = torch.cat([values[:, :2] * 8, values[:, :2] * 8 + 8 + values[:, 2:4] * 8], 1)
        if self.training and targets is not None:
            truth = torch.stack([target["boxes"][0] for target in targets])
            return {"boxes": (boxes - truth).abs().mean(), "scores": (1 - values[:, 4]).mean()}
        return [
            {"boxes": box[None], "labels": torch.ones(1, dtype=torch.long), "scores": value[None]}
            for box, value in zip(boxes, values[:, 4], strict=True)
        ]


def make_items(count: int) -> Items:
    target = {"boxes": torch.tensor([[4.0, 4.0, 16.0, 16.0]]), "labels": torch.ones(1, dtype=torch.long)}
    return Items([(torch.rand(3, 24, 24), dict(target)) for _ in range(count)], {1: "thing"})


def make_subject(model: nn.Module | None = None) -> Subject:
    return Subject("tiny", (model or Tiny()).eval(), make_items(3), make_items(4), None)
