"""Plans as values: JSON and back, and totals that equal those of the models."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from fxprune import Plan
from fxprune.graph.records import Link, Region, Rejection
from fxprune.planning.analysis import Analysis
from fxprune.planning.plan import Candidate, IslandRecord, NodeRecord, Totals
from fxprune.planning.provenance import Provenance
from tests.helpers.models import flops_of, labelled, params_of

# To JSON and back ----------------------------------------------------------------------------------------------------


def test_plan_is_loaded_as_it_was_saved(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(str(tmp_path / "plan.json"))
    assert loaded == plan
    assert loaded.removed == plan.removed
    assert len(plan.removed) == 2
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_plan_file_is_strict_json_of_this_version(plan: Plan, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert data == plan.to_dict()
    assert data["fxprune_plan"] == 4
    assert data["budget"] == 0.3
    assert [row["name"] for row in data["regions"] if row["removed"]] == [region.name for region in plan.removed]


def test_plan_to_dict_gives_a_plain_copy(plan: Plan) -> None:
    data = plan.to_dict()
    data["regions"][0]["nodes"].append("harm")
    data["settings"]["criterion"] = "harm"
    assert data != plan.to_dict()
    assert plan.settings["criterion"] == "fisher"


def test_plan_is_immutable(plan: Plan) -> None:
    with pytest.raises(FrozenInstanceError):
        plan.budget = 0.5  # type: ignore[misc]


_words = st.text(max_size=8)
_names = st.lists(_words, max_size=3).map(tuple)
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_counts = st.integers(0, 2**40)
_totals = st.builds(Totals, flops=_numbers, params=_counts, blocks=_counts, latency_ms=st.none() | _numbers)
_regions = st.builds(
    Region,
    name=_words,
    kind=st.sampled_from(["bypass", "drop"]),
    island=_words,
    exit=_words,
    stand_in=_words,
    nodes=_names,
    layers=_names,
)
_candidates = st.builds(
    Candidate,
    region=_regions,
    score=_numbers,
    flops=_numbers,
    params=_counts,
    block=st.booleans(),
    latency_ms=st.none() | _numbers,
)
_node_records = st.builds(
    NodeRecord,
    name=_words,
    island=_words,
    node=_words,
    op=_words,
    reads=_names,
    shape=st.none() | st.lists(st.integers(0, 2000), max_size=4).map(tuple),
    grad_act=st.none() | _numbers,
    l1=st.none() | _numbers,
    flops=_numbers,
)


_constants = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), _numbers, _words),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=3,
)
_islands = st.builds(
    IslandRecord,
    name=_words,
    fingerprint=_words,
    opaque=_names,
    constants=st.dictionaries(_words, _constants, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Plan,
        budget=st.floats(0.01, 0.99),
        cost=st.sampled_from(["flops", "latency", "params", "blocks"]),
        settings=st.dictionaries(_words, st.one_of(_words, _counts, _numbers, st.none())).map(Provenance),
        before=_totals,
        after=_totals,
        islands=st.lists(_islands, max_size=2).map(tuple),
        regions=st.lists(_candidates, max_size=3).map(tuple),
        rejections=st.lists(st.builds(Rejection, name=_words, reason=_words), max_size=3).map(tuple),
        nodes=st.lists(_node_records, max_size=3).map(tuple),
        links=st.lists(st.builds(Link, source=_words, target=_words), max_size=3).map(tuple),
    )
)
def test_any_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


# What a plan promises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["flops", "params", "blocks"])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.6])
def test_plan_totals_equal_those_of_the_models(
    tiny_model: nn.Module, analysis: Analysis, budget: float, cost: str
) -> None:
    plan = analysis.plan(budget, cost)
    pruned = fxprune.apply(tiny_model, plan)
    assert (plan.before.flops, plan.before.params, plan.before.blocks) == (
        flops_of(tiny_model),
        params_of(tiny_model),
        4,
    )
    assert (plan.after.flops, plan.after.params) == (flops_of(pruned), params_of(pruned))
    assert plan.after.blocks == 4 - len(plan.removed)
    before, after = getattr(plan.before, cost), getattr(plan.after, cost)
    assert 1 - after / before >= budget
    smallest = min(getattr(r, cost) if cost != "blocks" else 1 for r in plan.removed)
    assert 1 - (after + smallest) / before < budget


def test_one_analysis_gives_plans_of_many_budgets(analysis: Analysis) -> None:
    counts = [len(analysis.plan(budget).removed) for budget in (0.1, 0.2, 0.4, 0.6, 0.8)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert not any(region.removed for region in analysis.regions)
    assert analysis.plan(0.4) == analysis.plan(0.4)


def test_plan_removes_the_least_important_regions(plan: Plan) -> None:
    kept = [region.score for region in plan.regions if not region.removed]
    assert max(region.score for region in plan.removed) <= min(kept)


def test_plan_lists_the_islands_it_touches_only(detector: nn.Module) -> None:
    analysis = fxprune.analyze(detector, labelled())
    assert [island.name for island in analysis.islands] == ["body", "head"]
    plan = analysis.plan(0.1)
    assert {island.name for island in plan.islands} == {region.island for region in plan.removed}
    assert len(plan.islands) == 1
