"""Code outside a graph may overwrite what the graph returns: then no region may make that a value that others need."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture.islands import capture_islands
from tests.helpers.models import finite, labelled, pixels


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


class Overwrites(nn.Module):
    """Adds to what its body returns, in place, and reads the input of the body later."""

    in_place = True

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3)
        self.body = nn.Sequential(block(3), block(3), nn.Conv2d(3, 3, 1))
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(finite(x))
        second = self.body(first)
        if self.in_place:
            second += x
        else:
            second = second + x
        return self.head((first * second).mean((2, 3)))


class Adds(Overwrites):
    in_place = False


def candidates(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return fxprune.analyze(kind().eval(), labelled(), criterion="random")


def test_outputs_that_are_overwritten_are_found() -> None:
    for kind, expected in ((Overwrites, {"body"}), (Adds, set())):
        islands, _ = capture_islands(kind().eval(), [lambda network: network(pixels(2, 3, 8, 8))], False)
        assert {island.name for island in islands if island.overwritten} == expected


def test_regions_that_would_return_a_needed_value_are_rejected_with_the_reason() -> None:
    free = {region.name for region in candidates(Adds).regions}
    analysis = candidates(Overwrites)
    left = {region.name for region in analysis.regions}
    reasons = {rejection.name: rejection.reason for rejection in analysis.rejections}
    assert "body.2" in free - left
    assert left
    assert all("overwrites what it returns" in reasons[name] for name in free - left)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_removed_computes_what_plain_code_would(seed: int) -> None:
    torch.manual_seed(0)
    model = Overwrites().eval()
    plan = fxprune.analyze(model, labelled(), criterion="random", seed=seed).plan(0.2)
    pruned = fxprune.apply(model, plan)
    expected, x = copy.deepcopy(pruned), pixels(2, 3, 8, 8)
    vars(expected)["in_place"] = False
    assert torch.equal(pruned(x), expected(x))
    pruned.train()(x).sum().backward()
