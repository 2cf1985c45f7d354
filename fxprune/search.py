"""In several steps to a budget: after each removal what is left is scored anew, and mended on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from fxprune.analysis import Analysis
from fxprune.calibration import Calibration, take_loss
from fxprune.criteria import part_sizes
from fxprune.detectors.batch import Adapter
from fxprune.errors import BudgetError
from fxprune.isolation import private_copy
from fxprune.plan import Plan, Totals

STRIDE = 0.05
"""Share of what a step finds that it removes; a budget takes as many such steps as it needs."""
TRIES = 6
"""Plans a step that ``"search"`` looks at by the loss they lead to."""


@dataclass(frozen=True)
class Step:
    """One step of a search: the plan that was carried out and the loss that the mended model was left with."""

    plan: Plan
    loss: float
    tried: int


def targets(budget: float, strategy: str) -> list[float]:
    """Shares of the whole model's cost to have removed after each step, in geometric progression."""
    if strategy == "one_shot":
        return [budget]
    steps = max(1, math.ceil(math.log(1 - budget) / math.log(1 - STRIDE) - 1e-9))
    return [1 - (1 - budget) ** (step / steps) for step in range(1, steps + 1)]


def left_of(target: float, whole: Totals, now: Totals, cost: str) -> float:
    """What share of the present cost must go so that a share of the whole one is gone."""
    return float(1 - (1 - target) * getattr(whole, cost) / getattr(now, cost))


def candidates(analysis: Analysis, budget: float, cost: str, tries: int) -> Iterator[Plan]:
    """The best plan by score, and the best ones that do without one of the regions it takes, most doubtful first."""
    best = analysis.plan(budget, cost)
    yield best
    seen = {frozenset(region.name for region in best.removed)}
    doubtful = sorted(best.removed, key=lambda region: -region.score)
    for avoided in doubtful:
        if len(seen) >= tries:
            return
        others = tuple(region for region in analysis.regions if region.name != avoided.name)
        try:
            plan = replace(analysis, regions=others).plan(budget, cost)
        except BudgetError:
            continue
        found = frozenset(region.name for region in plan.removed)
        if found not in seen:
            seen.add(found)
            regions = tuple(replace(region, removed=region.name in found) for region in analysis.regions)
            yield replace(plan, regions=regions)


def loss_of(model: nn.Module, calibration: Calibration, adapter: Adapter, seed: int) -> torch.Tensor:
    """Parts (P,) of a model's loss over the calibration images."""
    network = private_copy(model)
    adapter.prepare(network)
    total, images = torch.zeros(()), 0
    with torch.no_grad():
        for index, batch in enumerate(calibration.batches(network, adapter)):
            total = total + batch.count * take_loss(network, adapter, batch, index, seed).cpu()
            images += batch.count
    return total / images


def worse_by(loss: torch.Tensor, whole: torch.Tensor) -> float:
    """How much the parts (P,) of a loss have grown, each relative to its own size, summed."""
    return float(((loss - whole) / part_sizes(whole)).sum())
