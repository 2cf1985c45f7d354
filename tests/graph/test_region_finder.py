"""Regions compared with a table written by hand and with a brute-force version of their definition."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxprune
from fxprune.capture.module_trace import Traced, trace_module
from fxprune.errors import NoRegionError
from fxprune.graph.fx_utils import SINK, SOURCE, is_weighted, node_parameters, value_graph
from fxprune.graph.records import Region
from fxprune.graph.region_finder import find_regions
from fxprune.graph.symbolic_shapes import SymbolicShapes, propagate_symbolic, tensor_specs
from fxprune.profiling.flops_params import group_parameters
from tests.helpers.models import Encoder, build, labelled
from tests.helpers.zoo import ZOO, conv, image_batch, mean_loss

NAMES = sorted(ZOO)


def test_whole_layer_its_attention_and_its_mlp_are_regions() -> None:
    analysis = fxprune.analyze(build(Encoder), labelled(), criterion="l1")
    names = {region.name: region for region in analysis.regions if region.name.startswith("layers.1")}
    assert {"layers.1", "layers.1.attention", "layers.1.mlp"} <= set(names)
    layers = {path.removeprefix("layers.1.") for path in names["layers.1"].layers}
    assert layers == {"attention.into", "attention.out", "attention.bias", "mlp.1", "mlp.3"}
    reasons = {rejection.reason for rejection in analysis.rejections if "layers.1" in rejection.name}
    assert reasons == {"it does no floating point work at inference on the first calibration batch"}  # adds the bias


def test_chain_of_layers_is_no_whole_region_of_its_module() -> None:
    model = nn.Sequential(conv(3), nn.ReLU(), conv(3)).eval()
    analysis = fxprune.analyze(model, [image_batch()], loss=mean_loss, criterion="l1")
    assert [region.name for region in analysis.regions] == ["0", "2"]


class Shifted(nn.Module):
    """Adds a constant that is computed from a weight, inside of a region."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3), conv(3)
        self.shift = nn.Parameter(torch.rand(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = torch.sigmoid(self.shift).sum(0).mean().mul(2)
        return x + self.two(self.one(x) * shift)


def test_values_computed_from_weights_alone_are_constants() -> None:
    traced = trace_module(Shifted(), ())
    assert isinstance(traced, Traced)
    gm = traced.gm
    constant = {"shift", "sigmoid", "sum_1", "mean", "mul"}
    assert not constant & set(value_graph(gm.graph))
    (reader,) = (node for node in gm.graph.nodes if node.name == "mul_1")
    assert [path for path, _ in node_parameters(gm, reader)] == ["shift"]
    readers = {group.readers for group in group_parameters(gm, [("", gm)])}
    assert readers == {(("", "one"),), (("", "mul_1"),), (("", "two"),)}
    shapes = propagate_symbolic(gm, tensor_specs((image_batch(),)), {})
    names = {region.exit: region.layers for region in find_regions("", gm, shapes)[0]}
    assert names["add"] == ("one", "shift", "two")


def captured(name: str) -> tuple[fx.GraphModule, SymbolicShapes]:
    """Graph and signatures of a zoo model."""
    traced = trace_module(ZOO[name].build(), frozenset())
    assert isinstance(traced, Traced)
    return traced.gm, propagate_symbolic(traced.gm, tensor_specs((image_batch(),)), {})


@pytest.mark.parametrize("name", NAMES)
def test_find_regions_matches_the_table_by_hand(name: str) -> None:
    gm, shapes = captured(name)
    found, _ = find_regions("", gm, shapes)
    assert {(region.name, region.kind) for region in found} == ZOO[name].regions


@pytest.mark.parametrize("name", NAMES)
def test_every_weighted_layer_is_in_a_region_or_rejected(name: str) -> None:
    gm, shapes = captured(name)
    found, rejections = find_regions("", gm, shapes)
    layers = {str(node.target) for node in gm.graph.nodes if is_weighted(gm, node)}
    covered = {layer for region in found for layer in region.layers}
    refused = {rejection.name for rejection in rejections}
    assert layers - covered <= refused
    assert all(len(rejection.reason) > 20 for rejection in rejections)


def closed(flow: nx.DiGraph, entry: str, exit_: str) -> set[str]:
    """Members of the region between two values by its definition, path by path; empty if it is none."""
    without_entry = nx.restricted_view(flow, [entry], [])
    without_exit = nx.restricted_view(flow, [exit_], [])
    reached = nx.descendants(without_entry, SOURCE)
    escaping = nx.ancestors(without_exit, SINK)
    members = {
        name for name in nx.descendants(flow, entry) if name not in reached and name not in escaping and name != SINK
    }
    fed = all(set(flow.predecessors(name)) <= members | {entry} for name in members)
    return members if exit_ in members and fed else set()


@pytest.mark.parametrize("name", NAMES)
def test_bypasses_are_closed_by_definition(name: str) -> None:
    gm, shapes = captured(name)
    found, _ = find_regions("", gm, shapes)
    flow = value_graph(gm.graph)
    for region in found:
        if region.kind == "bypass":
            assert set(region.nodes) == closed(flow, region.stand_in, region.exit)
            assert shapes.provably_equal(region.stand_in, region.exit)


@pytest.mark.parametrize("name", NAMES)
def test_find_regions_misses_no_smallest_region(name: str) -> None:
    gm, shapes = captured(name)
    found, _ = find_regions("", gm, shapes)
    flow = value_graph(gm.graph)
    weighted = {node.name for node in gm.graph.nodes if is_weighted(gm, node)}
    values = [name for name in flow if name in shapes.values]
    pairs = {
        (entry, exit_): members
        for entry, exit_ in product(values, values)
        if entry != exit_ and shapes.provably_equal(entry, exit_) and (members := closed(flow, entry, exit_)) & weighted
    }
    sets = list(pairs.values())
    smallest = [members for members in sets if not any(other < members and other & weighted for other in sets)]
    for members in smallest:
        assert any(set(region.nodes) & weighted >= members & weighted for region in found), members


@pytest.mark.parametrize("name", NAMES)
def test_drop_removes_what_only_the_sum_reads(name: str) -> None:
    gm, shapes = captured(name)
    found, _ = find_regions("", gm, shapes)
    flow = value_graph(gm.graph)
    for region in found:
        if region.kind == "drop":
            branch = set(region.nodes) - {region.exit}
            without = nx.restricted_view(flow, [region.exit], [])
            assert not any(nx.has_path(without, member, SINK) for member in branch)
            assert region.stand_in not in region.nodes


def test_find_regions_keeps_the_channel_shuffle() -> None:
    gm, shapes = captured("shuffle")
    found, _ = find_regions("", gm, shapes)
    assert not any("transpose" in node for region in found for node in region.nodes)


def test_find_regions_keeps_the_last_norm_of_a_transformer() -> None:
    gm, shapes = captured("pre_norm")
    (region,), _ = find_regions("", gm, shapes)
    assert "last" not in region.nodes
    assert {"norm", "up", "down"} <= set(region.nodes)


def test_shapes_equal_at_one_size_only_are_rejected() -> None:
    model = ZOO["even_only"].build()
    batches = [image_batch((64, 96))]
    with pytest.raises(NoRegionError, match="not provably at every size"):
        fxprune.analyze(model, batches, loss=mean_loss)


def test_rejection_names_a_reader_inside_the_region() -> None:
    gm, shapes = captured("tapped")
    _, rejections = find_regions("", gm, shapes)
    assert any(rejection.name == "b" and "the output" in rejection.reason for rejection in rejections)


def test_region_names_are_distinct_and_in_graph_order() -> None:
    gm, shapes = captured("shared_head")
    found, _ = find_regions("", gm, shapes)
    order = [node.name for node in gm.graph.nodes]
    assert [region.name for region in found] == ["tower", "tower#2"]
    assert [order.index(region.exit) for region in found] == sorted(order.index(region.exit) for region in found)


def test_shape_proof_holds_at_every_size() -> None:
    for name in NAMES:
        gm, shapes = captured(name)
        found, _ = find_regions("", gm, shapes)
        for size in ((16, 12), (18, 22), (9, 31)):
            images = image_batch(size, images=3)
            run = _Shapes(gm)
            run.run(*images if isinstance(images, tuple) else (images,))
            seen = run.shapes
            assert all(seen[region.stand_in] == seen[region.exit] for region in found), (name, size)


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = value.shape
        return value


class TwoInputs(nn.Module):
    """The sum of two branches, each of an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(self.left(first) + self.right(functional.relu(second)))


def _score_of(kept: str, region: Region, modules: Mapping[str, nn.Module]) -> float:
    return float(region.name == kept)


def test_dropped_branch_leaves_the_input_that_only_it_reads() -> None:
    model, batch = TwoInputs(), (torch.rand(2, 3, 8, 8), torch.rand(2, 2, 8, 8))
    for name in ("left", "right"):
        analysis = fxprune.analyze(
            model,
            [batch],
            loss=lambda network, pair: network(*pair).square().mean(),
            criterion=partial(_score_of, name),
        )
        assert {region.name for region in analysis.regions} == {"left", "right"}
        pruned = fxprune.apply(model, analysis.plan(1e-6, cost="blocks"))
        kept = model.left(batch[0]) if name == "left" else model.right(functional.relu(batch[1]))
        torch.testing.assert_close(pruned(*batch), model.head(kept))
        with pytest.raises(TypeError):
            pruned(batch[0])  # it still takes both
