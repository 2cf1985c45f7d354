"""Strategies: budgets, images, healing of trials, and interruption."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.adapters.protocol import Batch
from fxprune.datasets.calibration import CalibrationSet, open_calibration
from fxprune.errors import FxpruneWarning, SettingError
from fxprune.healing import methods
from fxprune.healing.loss_change import LossChange
from fxprune.healing.methods import HealingContext
from fxprune.healing.reconstruction.layerwise import reconstruct_layers
from fxprune.healing.saliency import saliency_maps
from fxprune.planning.plan import Plan
from fxprune.search.plan_search import DEFAULT_TRIES, STRATEGIES, PlanSearch
from tests.helpers.hostile import Unread, assert_refused, assert_unchanged
from tests.helpers.models import build, labelled, pixels, tiny


def plans_on(model: nn.Module) -> list[dict[str, Any]]:
    return [plan.to_dict() for plan in fxprune.report(model).plans]


def unlabelled() -> list[torch.Tensor]:
    return [pixels(2, 3, 16, 16, seed=seed) for seed in range(3)]


# Strategies ----------------------------------------------------------------------------------------------------------


def test_one_shot_equals_analyze_plan_apply() -> None:
    model = tiny()
    made = fxprune.analyze(model, labelled()).plan(0.3)
    assert plans_on(fxprune.compile(model, labelled(), 0.3, heal="none", measure=False)) == [made.to_dict()]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_meets_the_budget_and_keeps_the_model(strategy: str) -> None:
    model = tiny()
    for cost in ("flops", "params", "blocks"):
        with assert_unchanged(model):
            pruned = fxprune.compile(
                model, unlabelled(), 0.3, cost=cost, strategy=strategy, heal="affine", tries=2, seed=1
            )
        plans = fxprune.report(pruned).plans
        assert getattr(plans[-1].after, cost) <= 0.7 * getattr(plans[0].before, cost) + 1e-9
        assert pruned(pixels(2, 3, 16, 16)).shape == (2, 5)


def test_search_reads_the_loader_once_and_labels_by_the_original() -> None:
    batches = iter(unlabelled())
    fxprune.compile(tiny(), batches, 0.5, strategy="search", tries=2, heal="mimic", steps=2)
    assert list(batches) == []


def test_loss_change_is_relative_to_the_original_loss() -> None:
    model = tiny()
    pruned = fxprune.compile(model, labelled(), 0.3)
    opened = open_calibration(model, labelled(), None)
    judge = LossChange(opened.adapted, list(enumerate(opened.keep().batches)))
    assert judge.increase(model) == 0.0
    losses = [
        float(np.mean([float(nn.functional.cross_entropy(version(x), y).detach()) for x, y in labelled()]))
        for version in (pruned, model)
    ]
    assert losses[1] > 1  # what a loss of one part is relative to
    assert judge.increase(pruned) == pytest.approx(losses[0] / losses[1] - 1, rel=1e-4)


def test_search_judges_on_images_not_used_for_healing(monkeypatch: pytest.MonkeyPatch) -> None:
    mended: list[list[Batch]] = []
    judged: list[list[Batch]] = []
    mend, worse = PlanSearch.heal_trial, LossChange.increase

    def noted_mend(self: PlanSearch, pruned: nn.Module, images: CalibrationSet, context: HealingContext) -> nn.Module:
        mended.append(list(images.batches))
        return mend(self, pruned, images, context)

    def noted_worse(self: LossChange, pruned: nn.Module) -> float:
        judged.append([batch for _, batch in self.batches])
        return worse(self, pruned)

    monkeypatch.setattr(PlanSearch, "heal_trial", noted_mend)
    monkeypatch.setattr(LossChange, "increase", noted_worse)
    fxprune.compile(tiny(), unlabelled(), 0.3, strategy="search", heal="affine", tries=2)
    assert len(mended) == len(judged) > 1
    for some, others in zip(mended, judged, strict=True):
        assert some
        assert others
        assert all(one is not other for one in some for other in others)


def test_search_computes_saliency_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    fitted: list[Any] = []

    def noted_maps(pair: Any, batch: Batch, index: int = 0, seed: int = 0) -> Any:
        looked.append(index)
        return saliency_maps(pair, batch, index, seed)

    def noted_refit(pair: Any, batches: Any, fit: Any, tell: Any, saliency: Any) -> list[str]:
        fitted.append(saliency)
        return reconstruct_layers(pair, batches, fit, tell, saliency)

    monkeypatch.setattr(methods, "saliency_maps", noted_maps)
    monkeypatch.setattr(methods, "reconstruct_layers", noted_refit)
    fxprune.compile(tiny(), unlabelled(), 0.3, strategy="search", heal="affine", tries=3)
    *tried, last = fitted
    assert len(tried) > 1
    assert len({id(saliency) for saliency in tried}) == 1
    assert last is not tried[0]  # of all images
    assert len(looked) == len(tried[0]) + len(last)


class Brittle(nn.Module):
    """Its loss is no number without the block that makes everything positive."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.positive = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Softplus())
        self.rest = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.log(self.positive(self.stem(x)))
        for layer in self.rest:
            x = x + layer(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:after healing:fxprune.FxpruneWarning")
@pytest.mark.parametrize("heal", ["none", "affine"])
def test_plan_with_nan_loss_is_the_worst(heal: str) -> None:
    def first(region: Any, _: object) -> float:
        return 0.0 if region.name == "positive" else 1.0

    pruned = fxprune.compile(build(Brittle), labelled(), 0.03, strategy="search", heal=heal, criterion=first)
    (plan,) = fxprune.report(pruned).plans
    assert plan.settings["tried"] > 1
    json.dumps(plan.to_dict(), allow_nan=False)
    assert "positive" not in {region.name for region in plan.removed}


# Interruption --------------------------------------------------------------------------------------------------------


def test_interrupted_search_gives_the_best_so_far() -> None:
    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "search" and done == 1:
            raise KeyboardInterrupt

    with pytest.warns(FxpruneWarning, match=f"interrupted after 1 of {DEFAULT_TRIES}"):
        pruned = fxprune.compile(tiny(), labelled(), 0.5, strategy="search", progress=stop)
    assert fxprune.report(pruned).removed


def test_search_interrupted_before_the_first_plan_raises() -> None:
    def stop(stage: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    model = tiny()
    with assert_unchanged(model), pytest.raises(KeyboardInterrupt):
        fxprune.compile(model, labelled(), 0.5, strategy="search", progress=stop)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"strategy": "luck"}, "'luck' .*known: one_shot, search"),
        ({"strategy": "greedy"}, "strategy='greedy' is gone: 'one_shot'"),
        ({"heal": "norms"}, "heal='norms' is gone: 'affine'"),
        ({"criterion": "ablation"}, "criterion='ablation' is gone: 'fisher'"),
        ({"shapes": "sampled"}, "shapes= is gone"),
        ({"heal": "luck"}, "heal 'luck' is not known"),
        ({"tries": 0}, "tries is 0; give a number"),
        ({"tries": True}, "tries is True"),
        ({"cost": "luck"}, "cost 'luck' is not known"),
    ],
)
def test_unknown_settings_are_refused_before_reading_batches(setting: dict[str, Any], words: str) -> None:
    model = tiny()
    with assert_refused(model, SettingError, words):
        fxprune.compile(model, Unread(), 0.3, **setting)


def test_plans_of_a_search_can_be_saved_and_applied(tmp_path: Any) -> None:
    model = tiny()
    pruned = fxprune.compile(model, labelled(), 0.4, strategy="search", tries=2, heal="none")
    (plan,) = fxprune.report(pruned).plans
    plan.save(tmp_path / "plan.json")
    again = fxprune.apply(model, Plan.load(tmp_path / "plan.json"))
    x = pixels(2, 3, 16, 16)
    assert torch.equal(again(x), pruned(x))
    assert json.loads(json.dumps(plan.to_dict(), allow_nan=False)) == plan.to_dict()
