"""Strategy "search": which plans it tries, and which it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.healing.loss_change import LossChange
from tests.helpers.models import Block, Tiny, build, labelled, pixels, tiny


def test_search_takes_the_plan_of_least_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[frozenset[str], float]] = []
    worse = LossChange.increase

    def noted(self: LossChange, pruned: nn.Module) -> float:
        loss = worse(self, pruned)
        tried.append((frozenset(region.name for region in fxprune.report(pruned).removed), loss))
        return loss

    monkeypatch.setattr(LossChange, "increase", noted)
    pruned = fxprune.compile(tiny(), labelled(), 0.4, strategy="search", tries=6)
    (plan,) = fxprune.report(pruned).plans
    assert len(tried) == len({regions for regions, _ in tried}) == plan.settings["tried"] <= 6
    best, loss = min(tried, key=lambda pair: pair[1])
    assert {region.name for region in plan.removed} == best
    assert plan.settings["loss_increase"] == loss
    scores = fxprune.analyze(tiny(), labelled()).regions
    assert [region.score for region in plan.regions] == [region.score for region in scores]  # as measured, not believed


class Uneven(Tiny):
    """With a block on a single place: many parameters, next to no FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.slight = Block(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.slight(self.blocks(self.stem(x)).mean((2, 3), keepdim=True)).flatten(1))


def test_regions_of_tiny_cost_are_tried_only_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[set[str]] = []
    worse = LossChange.increase

    def noted(self: LossChange, pruned: nn.Module) -> float:
        tried.append({region.name for region in fxprune.report(pruned).removed})
        return worse(self, pruned)

    monkeypatch.setattr(LossChange, "increase", noted)
    free = lambda region, modules: float(region.name != "slight")  # noqa: E731
    large = [(pixels(2, 3, 64, 64, seed=seed), torch.tensor([seed, 4])) for seed in range(3)]
    analysis = fxprune.analyze(build(Uneven), large)
    share = {region.name: region.flops / analysis.before.flops for region in analysis.regions}
    nearly, most = 2 * share["blocks.0"] + share["slight"] / 2, sum(share.values()) - share["slight"] / 2
    for budget, cost, goes in ((nearly, "flops", False), (0.5, "params", True), (most, "flops", True)):
        tried.clear()
        pruned = fxprune.compile(
            build(Uneven), large, budget, cost=cost, strategy="search", criterion=free, heal="none"
        )
        assert any("slight" in plan for plan in tried) == goes
        (plan,) = fxprune.report(pruned).plans
        assert [region.name for region in plan.regions] == list(share)


def test_search_stops_when_all_plans_are_tried() -> None:
    pruned = fxprune.compile(tiny(), labelled(), 0.8, strategy="search", tries=100)
    (plan,) = fxprune.report(pruned).plans
    assert plan.settings["tried"] < 20
