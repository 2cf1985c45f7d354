"""Latency budgets: analyses and plans from given or measured milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import BudgetError, Plan, SettingError
from fxprune.planning import analyzer
from fxprune.planning.analysis import Analysis
from fxprune.profiling.latency import BACKENDS, Backend, Latency, backend_copy
from tests.helpers.models import Detector, build, labelled, pixels

X = pixels(2, 3, 16, 16)


# Analyses and plans --------------------------------------------------------------------------------------------------


FIGURES = {"body.1": 1.0, "body.2": 2.0, "body.3": 0.0, "body.4": 3.0, "head.0": 1.5}
SCORES = {"body.1": 1.0, "body.2": 5.0, "body.3": 0.0, "body.4": 4.0, "head.0": 2.0}
ON = {"device": "cpu", "images": 2, "threads": 1, "rounds": 15, "floor": 0.02}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """Stand in for the measuring; the backends that were asked for."""
    backends: list[Backend] = []

    def measure(backend: Backend, *_: Any, **__: Any) -> Latency:
        backends.append(backend)
        return Latency(10.0, FIGURES, ON)

    monkeypatch.setattr(analyzer, "measure_latency", measure)
    return backends


def score(region: Any, _: Mapping[str, nn.Module]) -> float:
    return SCORES[region.name]


@pytest.fixture
def analysis(asked: list[Backend], detector: nn.Module) -> Analysis:
    return fxprune.analyze(detector, labelled(), criterion=score, latency_backend="eager")


@pytest.mark.parametrize(
    ("budget", "removed"),
    [
        (0.05, ["body.1"]),
        (0.1, ["body.1"]),
        (0.12, ["head.0"]),
        (0.2, ["body.1", "head.0"]),
        (0.3, ["body.4"]),
        (0.4, ["body.1", "body.4"]),
        (0.74, ["body.1", "body.2", "body.4", "head.0"]),
    ],
)
def test_latency_budget_removes_the_least_important_regions_that_meet_it(
    analysis: Analysis, budget: float, removed: list[str]
) -> None:
    plan = analysis.plan(budget, "latency")
    assert [region.name for region in plan.removed] == removed
    assert plan.before.latency_ms == 10.0
    assert plan.after.latency_ms == pytest.approx(10.0 - sum(FIGURES[name] for name in removed))
    assert plan.settings["latency"] == {"backend": "eager", **ON}


def test_plans_of_other_costs_predict_latency(analysis: Analysis) -> None:
    plan = analysis.plan(0.5, "flops")
    assert plan.after.latency_ms == pytest.approx(10.0 - sum(FIGURES[region.name] for region in plan.removed))


def test_latency_plan_survives_json(analysis: Analysis) -> None:
    plan = analysis.plan(0.3, "latency")
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert {region.name: region.latency_ms for region in plan.regions} == FIGURES


def test_latency_budget_above_all_regions_is_refused(analysis: Analysis) -> None:
    with pytest.raises(BudgetError, match=r"give 75\.0% at most"):
        analysis.plan(0.8, "latency")


def test_latency_budget_below_the_noise_is_refused(analysis: Analysis) -> None:
    with pytest.raises(BudgetError, match=r"budget 0\.01 .*noise.*2\.0%"):
        analysis.plan(0.01, "latency")
    assert analysis.plan(0.01, "flops").removed


def test_analyze_without_latency_backend_measures_nothing(detector: nn.Module, asked: list[Backend]) -> None:
    analysis = fxprune.analyze(detector, labelled(), criterion="l1")
    assert asked == []
    assert analysis.before.latency_ms is None
    assert "latency" not in analysis.settings
    plan = analysis.plan(0.2)
    assert (plan.after.latency_ms, {region.latency_ms for region in plan.regions}) == (None, {None})
    with pytest.raises(SettingError, match=r"none were measured.*latency_backend="):
        analysis.plan(0.2, "latency")


@pytest.mark.parametrize(("given", "expected"), [(None, "eager"), ("eager", "eager"), ("inductor", "inductor")])
def test_compile_measures_latency_on_the_given_backend(
    detector: nn.Module, asked: list[Backend], given: str | None, expected: str
) -> None:
    pruned = fxprune.compile(detector, labelled(), 0.3, criterion=score, cost="latency", latency_backend=given)
    assert asked == [BACKENDS[expected]]
    report = fxprune.report(pruned)
    assert [region.name for region in report.removed] == ["body.4"]
    assert report.after.latency_ms == pytest.approx(7.0)


@pytest.mark.parametrize("backend", ["gpu", "", 3, ["eager"], True])
def test_unknown_latency_backend_is_refused(detector: nn.Module, backend: Any) -> None:
    with pytest.raises(SettingError, match=r"latency_backend .*known: eager, inductor"):
        fxprune.analyze(detector, labelled(), latency_backend=backend)


def test_measured_model_is_unchanged(detector: nn.Module) -> None:
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    mode, torch_state = detector.training, torch.get_rng_state()
    analysis = fxprune.analyze(detector, labelled(), criterion="l1", latency_backend="eager")
    assert analysis.before.latency_ms is not None
    assert None not in {region.latency_ms for region in analysis.regions}
    unmeasured = fxprune.analyze(detector, labelled(), criterion="l1")
    assert tuple(replace(region, latency_ms=None) for region in analysis.regions) == unmeasured.regions
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert detector.training is mode
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.slow
@pytest.mark.usefixtures("forget_compiled_code")
def test_backend_copy_compiles_more_models_than_the_recompile_limit() -> None:
    frames = torch._dynamo.utils.counters["frames"]
    limit = torch._dynamo.config.recompile_limit
    backend = BACKENDS["inductor"]
    for width in range(1, limit + 3):
        twin, before = backend_copy(build(Detector, width=width), backend), frames["ok"]
        with torch.no_grad(), backend.context():
            twin(X)
        assert frames["ok"] > before
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.slow
@pytest.mark.usefixtures("forget_compiled_code")
def test_inductor_compiles_the_model_and_one_of_equal_blocks(detector: nn.Module) -> None:
    told: list[Any] = []
    analysis = fxprune.analyze(
        detector, labelled(), criterion="l1", latency_backend="inductor", progress=lambda *stage: told.append(stage)
    )
    assert ("compile", 1, 1) in told
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    assert len({region.latency_ms for region in analysis.regions}) == 1
    assert analysis.settings["latency"]["backend"] == "inductor"
