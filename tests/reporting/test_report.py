"""The report of a pruned model or a plan, as a value and as JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import ModelError, Plan
from fxprune.reporting.report import Report
from tests.helpers.hostile import removed
from tests.helpers.models import Detector, Tiny, build, flops_of, labelled, params_of, partly_labelled

# The value -----------------------------------------------------------------------------------------------------------


def test_report_totals_equal_those_of_the_models(tiny_model: nn.Module, pruned_tiny: nn.Module, report: Report) -> None:
    assert (report.before.flops, report.before.params, report.before.blocks) == (
        flops_of(tiny_model),
        params_of(tiny_model),
        4,
    )
    assert (report.after.flops, report.after.params) == (flops_of(pruned_tiny), params_of(pruned_tiny))
    assert report.after.blocks == 2
    assert report.after.flops <= 0.7 * report.before.flops


def test_report_regions_ascend_in_score_and_mark_removed_ones(pruned_tiny: nn.Module, report: Report) -> None:
    blocks = {f"blocks.{i}" for i in range(4)}
    assert {region.name for region in report.regions} == blocks
    scores = [region.score for region in report.regions]
    assert scores == sorted(scores)
    assert [region.removed for region in report.regions] == [True, True, False, False]
    assert report.removed == report.regions[:2]
    left = {".".join(key.split(".")[:2]) for key in pruned_tiny.state_dict() if key.startswith("blocks.")}
    assert left == blocks - {region.name for region in report.removed}


def test_report_rejections_have_reasons(report: Report) -> None:
    assert {rejection.name for rejection in report.rejections} == {"stem", "fc"}
    assert all("it turns" in rejection.reason for rejection in report.rejections)


def test_report_settings_say_how_the_model_was_pruned(report: Report) -> None:
    expected = {
        "criterion": "fisher",
        "budget": 0.3,
        "cost": "flops",
        "seed": 0,
        "images": 5,
        "batches": 3,
        "prunings": 1,
    }
    assert {key: report.settings[key] for key in expected} == expected
    assert report.settings["versions"]["torch"] == torch.__version__
    assert report.settings["versions"]["fxprune"] == fxprune.__version__


@pytest.mark.parametrize(
    ("loader", "targets"),
    [
        (labelled(), "labels given"),
        (partly_labelled()[2:], "the model's own confident outputs"),
        (partly_labelled(), "some"),
    ],
    ids=["labels", "images", "both"],
)
def test_report_settings_say_where_targets_came_from(tiny_model: nn.Module, loader: list[Any], targets: str) -> None:
    assert targets in fxprune.report(fxprune.compile(tiny_model, loader, 0.1)).settings["targets"]


def test_report_is_immutable(report: Report) -> None:
    with pytest.raises(FrozenInstanceError):
        report.before = report.after  # type: ignore[misc]


def test_report_of_one_model_is_always_equal(pruned_tiny: nn.Module, report: Report) -> None:
    assert fxprune.report(pruned_tiny) == report
    assert fxprune.report(pruned_tiny) is not report


def test_report_to_dict_is_plain_data(report: Report) -> None:
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert set(data) == {"applied", "before", "after", "steps", "regions", "rejections", "settings"}
    assert data["before"] == {
        "flops": report.before.flops,
        "params": report.before.params,
        "blocks": 4,
        "latency_ms": None,
    }
    assert [row["name"] for row in data["regions"] if row["removed"]] == [r.name for r in report.removed]
    data["regions"][0]["layers"].append("harm")
    assert report.to_dict() != data


@pytest.mark.parametrize("kind", [Tiny, Detector])
@pytest.mark.parametrize("times", [1, 2])
def test_report_survives_copies(kind: type[nn.Module], times: int) -> None:
    pruned = fxprune.compile(build(kind), partly_labelled(), 0.3)
    twin = pruned
    for _ in range(times):
        twin = copy.deepcopy(twin)
    assert twin is not pruned
    assert fxprune.report(twin) == fxprune.report(pruned)
    assert len(removed(twin)) == 2


def test_report_survives_precision_and_mode(pruned_tiny: nn.Module, report: Report) -> None:
    assert fxprune.report(copy.deepcopy(pruned_tiny).half().train()) == report


# Of a plan ----------------------------------------------------------------------------------------------------------


def test_report_of_a_plan_says_what_it_will_do(tiny_model: nn.Module, plan: Plan) -> None:
    before, after = fxprune.report(plan), fxprune.report(fxprune.apply(tiny_model, plan))
    assert (before.applied, after.applied) == (False, True)
    assert before != after
    assert before.to_dict() == {**after.to_dict(), "applied": False}
    assert str(before).startswith("This plan removes 2 of 4 candidates\n")
    assert str(after).startswith("fxprune removed 2 of 4 candidates\n")
    first, second = (str(one).partition("\nMeasured\n")[0].splitlines() for one in (before, after))
    assert first[1:] == second[1:]


def test_report_repr_is_one_line(report: Report) -> None:
    assert "\n" not in repr(report)
    assert repr(report).startswith("<Report: 2 of 4 candidates, −45.7% FLOPs")


# Pruned more than once -----------------------------------------------------------------------------------------------


def test_report_of_two_prunings_adds_up(
    tiny_model: nn.Module, pruned_tiny: nn.Module, pruned_twice: nn.Module, report: Report
) -> None:
    total = fxprune.report(pruned_twice)
    assert total.before == report.before
    assert (total.after.flops, total.after.params) == (flops_of(pruned_twice), params_of(pruned_twice))
    assert total.after.flops < report.after.flops
    assert total.after.blocks == 4 - len(total.removed) == 1
    assert set(removed(pruned_tiny)) < set(removed(pruned_twice))
    assert sorted(region.name for region in total.regions) == [f"blocks.{i}" for i in range(4)]
    assert [r.removed for r in total.regions].count(True) == 3


def test_report_of_two_prunings_has_the_last_settings(pruned_twice: nn.Module, report: Report) -> None:
    settings = fxprune.report(pruned_twice).settings
    assert (settings["prunings"], settings["criterion"], settings["cost"]) == (2, "l1", "params")
    assert settings["budget"] == 0.2
    assert (report.settings["prunings"], report.settings["criterion"]) == (1, "fisher")
    (earlier,) = settings["earlier"]
    assert earlier["removed"] == [region.name for region in report.removed]
    assert {**earlier, "prunings": 1} == {**report.settings, "removed": earlier["removed"]}
    json.dumps(fxprune.report(pruned_twice).to_dict(), allow_nan=False)


def test_pruning_again_does_not_change_the_first_report(
    pruned_tiny: nn.Module, pruned_twice: nn.Module, report: Report
) -> None:
    assert fxprune.report(pruned_twice) != report
    assert fxprune.report(pruned_tiny) == report


def test_second_pruning_uses_the_names_of_the_first(detector: nn.Module) -> None:
    """A second pruning sees the graph the first one left: names, scores and costs are of the same layers."""
    once = fxprune.compile(detector, partly_labelled(), 0.3)
    again = fxprune.compile(once, partly_labelled(), 0.2)
    assert set(removed(again)) < {"head.0", *(f"body.{i}" for i in range(1, 5))}
    assert len(removed(again)) == len(set(removed(again))) == 3


# Refused -------------------------------------------------------------------------------------------------------------


def test_report_refuses_an_unpruned_model(tiny_model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"Tiny .*no fxprune plan"):
        fxprune.report(tiny_model)


def test_report_refuses_a_part_of_a_pruned_model(detector: nn.Module) -> None:
    pruned = fxprune.compile(detector, partly_labelled(), 0.3)
    with pytest.raises(ModelError, match="carries no fxprune plan"):
        fxprune.report(pruned.get_submodule("body"))


@pytest.mark.parametrize("thing", [None, "plan.json", {}])
def test_report_refuses_what_is_no_model(thing: Any) -> None:
    with pytest.raises(ModelError, match=f"expected a torch.nn.Module, got {type(thing).__name__}"):
        fxprune.report(thing)
