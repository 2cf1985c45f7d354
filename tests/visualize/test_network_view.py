"""The data of a drawing: links between islands, blocks, and the plan of each budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import ModelError, Plan
from fxprune.graph.records import IMAGES, RESULTS, Link
from fxprune.planning.analysis import Analysis
from fxprune.rewriting.history import attach_history
from fxprune.visualize.network_view import IMAGES_NODE, RESULTS_NODE, build_view
from tests.helpers.models import Block, Detector, build, finite, labelled, tiny
from tests.helpers.systems import SIX, Sizes, System


def labels(picture: dict[str, Any]) -> list[str]:
    return [block["label"] for block in picture["blocks"]]


def arrows(picture: dict[str, Any]) -> set[tuple[str, str]]:
    names = {IMAGES_NODE: "images", RESULTS_NODE: "results"} | dict(enumerate(labels(picture)))
    return {(names[source], names[target]) for source, target in picture["block_edges"]}


# Links ----------------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Two levels, a head that both share, and Python in between; `head` stands before `body`, which runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(Block(8), nn.Conv2d(8, 5, 1))
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8))
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), Block(8))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.body(finite(x))
        coarse = self.down(finite(fine * 2))
        scores = [self.head(level).mean((2, 3)) for level in (fine, coarse)]
        return torch.stack(scores).sum(0)


def test_links_follow_python_between_islands() -> None:
    analysis = fxprune.analyze(build(Pyramid), labelled())
    assert set(analysis.links) == {
        Link(IMAGES, "body"),
        Link("body", "down"),
        Link("body", "head"),
        Link("down", "head"),
        Link("head", RESULTS),
    }


def test_links_do_not_depend_on_frozen_weights() -> None:
    model = build(Pyramid)
    links = fxprune.analyze(model, labelled()).links
    assert fxprune.analyze(model.requires_grad_(False), labelled()).links == links


def test_one_graph_is_linked_to_images_and_results(analysis: Analysis) -> None:
    assert analysis.links == (Link(IMAGES, ""), Link("", RESULTS))


class Again(nn.Module):
    """Runs one captured part on what it gave before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(finite(self.body(finite(self.stem(x))))).mean((2, 3)))


def test_island_that_reads_its_own_results_is_shown_once() -> None:
    analysis = fxprune.analyze(build(Again), labelled())
    assert Link("body", "body") in analysis.links
    picture = build_view(analysis)
    assert arrows(picture) == {
        ("images", "stem"), ("stem", "body.0"), ("body.0", "body.1"), ("body.1", "fc"), ("fc", "results"),
    }  # fmt: skip


# Blocks ---------------------------------------------------------------------------------------------------------------


def test_view_of_a_chain_has_its_blocks_and_arrows(analysis: Analysis) -> None:
    picture = build_view(analysis)
    names = ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "mean", "fc"]
    assert arrows(picture) == set(zip(["images", *names], [*names, "results"], strict=True))
    stem, first, *_, mean, fc = picture["blocks"]
    assert picture["regions"][first["region"]]["name"] == "blocks.0"
    assert first["summary"] == "Conv2d · BatchNorm2d · ReLU · add"
    assert first["params"] == 8 * 8 * 9 + 16
    assert mean["glue"]
    assert stem["region"] is None
    reasons = {rejection["name"]: rejection["reason"] for rejection in picture["rejections"]}
    assert (stem["reason"], fc["reason"]) == (reasons["stem"], reasons["fc"])


def test_view_has_arrows_between_islands() -> None:
    picture = build_view(fxprune.analyze(build(Pyramid), labelled()))
    assert {("body.1", "down.0"), ("body.1", "head.0"), ("down.1", "head.0"), ("head.1", "results")} <= arrows(picture)
    assert ("images", "body.0") in arrows(picture)


class Shuffled(nn.Module):
    """Mixes its channels by numbers that it computes from sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


def test_view_leaves_out_arithmetic_on_sizes() -> None:
    picture = build_view(fxprune.analyze(build(Shuffled), labelled()))
    assert labels(picture) == ["stem", "block", "view · transpose · reshape · mean", "fc"]
    assert not {"size", "floordiv", "getitem"} & {node["op"] for node in picture["nodes"]}


def of_six(system: System) -> tuple[nn.Module, Any]:
    sizes = Sizes(classifier_px=64, classifier_images=2, detector_px=128, detector_images=1)
    return system.build(sizes, 2 if system.family == "ultralytics" else None)


@pytest.mark.parametrize(
    "system", [pytest.param(s, marks=[] if s.family == "classifier" else pytest.mark.slow, id=s.name) for s in SIX]
)
def test_views_of_the_six_systems_are_consistent(system: System) -> None:
    model, batch = of_six(system)
    analysis = fxprune.analyze(model, [batch], criterion="l1")
    picture = build_view(analysis)
    graph = nx.DiGraph([tuple(edge) for edge in picture["block_edges"]])
    assert nx.is_directed_acyclic_graph(graph)
    assert set(graph) == {IMAGES_NODE, RESULTS_NODE, *range(len(picture["blocks"]))}
    assert nx.ancestors(graph, RESULTS_NODE) == set(graph) - {RESULTS_NODE}
    assert nx.descendants(graph, IMAGES_NODE) == set(graph) - {IMAGES_NODE}
    members = [node for block in picture["blocks"] for node in block["nodes"]]
    assert sorted(members) == list(range(len(picture["nodes"])))
    for region, candidate in zip(picture["regions"], analysis.regions, strict=True):
        held = {picture["nodes"][node]["block"] for node in region["nodes"]}
        owners = [picture["blocks"][block]["region"] for block in held]
        assert any(owner is not None for owner in owners) or not candidate.block  # its own, or what it overlaps with
        assert region["nodes"]


# Plans ----------------------------------------------------------------------------------------------------------------


def test_view_has_the_plan_of_every_percent(analysis: Analysis) -> None:
    picture = build_view(analysis)
    assert picture["initial"] is None
    assert [row["budget"] for row in picture["plans"][:3]] == [0.01, 0.02, 0.03]
    for row in picture["plans"]:
        plan = analysis.plan(row["budget"])
        assert [picture["regions"][index]["name"] for index in row["removed"]] == [r.name for r in plan.removed]
        assert row["after"] == vars(plan.after)


@pytest.mark.parametrize(("budget", "cost"), [(0.2, "flops"), (0.255, "params")])
def test_view_can_start_with_a_given_plan(analysis: Analysis, budget: float, cost: str) -> None:
    plan = analysis.plan(budget, cost)
    picture = build_view(analysis, plan)
    budgets = [row["budget"] for row in picture["plans"]]
    assert budgets == sorted(set(budgets))
    assert picture["cost"] == cost
    assert picture["plans"][picture["initial"]]["budget"] == budget
    assert picture["plans"][picture["initial"]]["after"] == vars(plan.after)


def test_view_of_latency_budgets_starts_above_the_noise(analysis: Analysis) -> None:
    regions = tuple(replace(region, latency_ms=2.0) for region in analysis.regions)
    settings = analysis.settings.with_entries(latency={"backend": "eager", "floor": 0.0312})
    timed = replace(analysis, regions=regions, before=replace(analysis.before, latency_ms=10.0), settings=settings)
    picture = build_view(timed, timed.plan(0.2, "latency"))
    assert [row["budget"] for row in picture["plans"]] == [percent / 100 for percent in range(4, 81)]
    assert [region["latency_ms"] for region in picture["regions"]] == [2.0] * 4
    assert picture["plans"][picture["initial"]]["after"]["latency_ms"] == 8.0


@pytest.mark.parametrize("of", [lambda plan, pruned: plan, lambda plan, pruned: pruned], ids=["plan", "pruned"])
def test_view_of_a_plan_and_of_a_pruned_model_shows_removed_regions(
    tiny_model: nn.Module, plan: Plan, analysis: Analysis, of: Callable[..., Any]
) -> None:
    picture = build_view(of(plan, fxprune.apply(tiny_model, plan)))
    assert picture["initial"] == 0
    assert labels(picture) == labels(build_view(analysis))
    (row,) = picture["plans"]
    assert [picture["regions"][index]["name"] for index in row["removed"]] == [r.name for r in plan.removed]
    assert picture["title"] == "Tiny"
    assert sorted(region["rank"] for region in picture["regions"]) == [1, 2, 3, 4]


def test_view_of_a_model_pruned_in_steps_shows_all_removed_regions(pruned_twice: nn.Module, analysis: Analysis) -> None:
    picture, report = build_view(pruned_twice), fxprune.report(pruned_twice)
    assert labels(picture) == labels(build_view(analysis))
    assert picture["initial"] == 1
    names = [{picture["regions"][index]["name"] for index in row["removed"]} for row in picture["plans"]]
    assert names == [set(report.steps[0].removed), {region.name for region in report.removed}]
    assert [row["after"] for row in picture["plans"]] == [vars(step.after) for step in report.steps]
    assert picture["plans"][1]["budget"] == pytest.approx(1 - report.after.flops / report.before.flops)


def test_view_shows_a_step_alone_if_the_first_network_lacks_its_regions() -> None:
    network = tiny()
    once = fxprune.compile(network, labelled(), 0.1)
    twice = fxprune.compile(once, labelled(), 0.1)
    first, second = fxprune.report(twice).plans
    foreign = [replace(row, region=replace(row.region, name=f"{row.name}, joined")) for row in second.regions]
    attach_history(twice, [first.to_dict(), replace(second, regions=tuple(foreign)).to_dict()], [])
    (row,) = build_view(twice)["plans"]
    assert len(row["removed"]) == len(second.removed)


BRACKETS = str.maketrans("()", "[]", ",")
"""Tuples become lists in JSON."""


def test_view_is_json(analysis: Analysis) -> None:
    picture = build_view(analysis)
    read = json.loads(json.dumps(picture, allow_nan=False))
    assert {name: repr(read[name]).translate(BRACKETS) for name in read} == {
        name: repr(picture[name]).translate(BRACKETS) for name in picture
    }


def test_view_of_an_unpruned_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Detector .*no fxprune plan.*give"):
        build_view(build(Detector))
