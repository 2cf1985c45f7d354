"""Models and images for healing, and the distance between two models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.adapters.registry import choose_adapter
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.teacher_student import TeacherStudent, pair_models
from fxprune.planning.analysis import Analysis
from fxprune.planning.plan import Plan
from fxprune.runtime.private_copy import private_copy
from tests.helpers.models import labelled, pixels, tiny


def images(batches: int = 3, count: int = 4) -> list[Tensor]:
    return [pixels(count, 3, 16, 16, seed=seed) for seed in range(batches)]


def without(analysis: Analysis, *names: str) -> Plan:
    """A plan that removes just these blocks."""
    free = fxprune.analyze(tiny(), labelled(), criterion=lambda region, _: float(region.name not in names))
    share = sum(region.flops for region in free.regions if region.name in names) / free.before.flops
    plan = free.plan(share - 1e-6)
    assert {region.name for region in plan.removed} == set(names)
    return plan


def pair_of(model: nn.Module, pruned: nn.Module, batches: list[Tensor]) -> tuple[TeacherStudent, list[Any]]:
    old, new = private_copy(model), private_copy(pruned)
    adapter = choose_adapter(old, batches[0], None)
    read = [adapter.normalize(old, batch) for batch in batches]
    return pair_models(old, new, adapter, read[0], [""]), read


def far(model: nn.Module, pruned: nn.Module, batches: list[Tensor]) -> float:
    pair, read = pair_of(model, pruned, batches)
    return FeatureDistance(pair, read).mean(read)


def state(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(first), state(second), strict=True))


class Chain(nn.Module):
    """Convolutions in a row, the middle one removable."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 5, 3, stride=2, dilation=2, padding=1, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))).mean((2, 3))


def tiny_with_statistics() -> nn.Module:
    """The tiny classifier with statistics of its own images."""
    network = tiny()
    network.train()
    with torch.no_grad():
        for _ in range(30):
            for batch in images():
                network(batch)
    return network.eval()
