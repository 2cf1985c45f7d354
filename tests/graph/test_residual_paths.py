"""Whole layers that read several values from outside, and which of these values replaces them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.capture.module_trace import Traced, trace_module
from fxprune.graph.fx_utils import value_graph
from fxprune.graph.records import Region
from fxprune.graph.region_finder import find_regions
from fxprune.graph.residual_paths import continued_value
from fxprune.graph.symbolic_shapes import propagate_symbolic, tensor_specs
from tests.helpers.layers import AddsPositions, Decoder, Layered, PostNormLayer, PreNormLayer, TwoStreamLayer, mlp
from tests.helpers.models import build, pixels


def captured(model: nn.Module) -> Traced:
    traced = trace_module(model, frozenset())
    assert isinstance(traced, Traced)
    return traced


def regions_of(model: nn.Module) -> dict[str, Region]:
    gm = captured(model).gm
    shapes = propagate_symbolic(gm, tensor_specs((pixels(2, 3, 16, 16),)), {})
    return {region.name: region for region in find_regions("", gm, shapes)[0]}


MODELS = {
    "post_norm": lambda layers: build(Layered, layer=PostNormLayer, layers=layers),
    "pre_norm": lambda layers: build(Decoder, layer=PreNormLayer, layers=layers),
    "two_streams": lambda layers: build(Layered, layer=TwoStreamLayer, layers=layers),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_whole_layer_with_a_second_value_continues_the_tokens(name: str) -> None:
    regions = regions_of(MODELS[name](2))
    first, second = regions["layers.0"], regions["layers.1"]
    assert (first.kind, second.kind) == ("bypass", "bypass")
    assert first.stand_in == "contiguous"  # the tokens; the second value is contiguous_1
    assert second.stand_in == first.exit
    prefix = "layers_1_"
    assert {node for node in second.nodes if node.startswith(prefix)} == {
        layer.replace(".", "_") for layer, _ in captured(MODELS[name](2)).gm.named_modules() if layer in _leaves(name)
    }
    assert len(second.nodes) == len(first.nodes)


def _leaves(name: str) -> set[str]:
    """Paths of the layers of torch in the second layer."""
    parts = MODELS[name](2).named_modules()
    return {path for path, part in parts if path.startswith("layers.1.") and not list(part.children())}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_whole_layer_leaves_its_branches_as_regions_of_their_own(name: str) -> None:
    regions = regions_of(MODELS[name](2))
    whole = set(regions["layers.1"].nodes)
    parts = [region for region in regions.values() if set(region.nodes) < whole]
    assert len(parts) >= 2
    assert {layer for part in parts for layer in part.layers} == set(regions["layers.1"].layers)


def test_value_that_no_other_layer_reads_is_the_one_that_a_layer_continues() -> None:
    regions = regions_of(build(Layered, layer=AddsPositions, layers=2))
    assert regions["layers.0"].stand_in == "contiguous"
    assert regions["layers.1"].stand_in == regions["layers.0"].exit


def test_layer_that_continues_two_values_alike_is_no_region() -> None:
    regions = regions_of(build(Layered, layer=AddsPositions, layers=1))
    assert "layers.0" not in regions
    assert {"layers.0.one", "layers.0.two"} <= set(regions)


class Merge(nn.Module):
    """Computes its result from both values, by layers alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = mlp(width), mlp(width)

    def forward(self, side: Tensor, tokens: Tensor) -> Tensor:
        return self.one(tokens) + self.two(side)


def test_layer_that_continues_no_value_is_no_region() -> None:
    regions = regions_of(build(Layered, layer=Merge))
    assert not {"layers.0", "layers.1"} & set(regions)


class BothGoOn(nn.Module):
    """Returns both of its values with a branch added to each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = mlp(width), mlp(width)

    def forward(self, side: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens + self.one(side)
        return tokens, tokens + self.two(tokens)


class Branching(Layered):
    def call(self, layer: nn.Module, tokens: Tensor, side: Tensor) -> Tensor:
        first, second = layer(side, tokens)
        return first * second


def test_layer_with_two_results_is_no_region() -> None:
    assert not {"layers.0", "layers.1"} & set(regions_of(build(Branching, layer=BothGoOn)))


class Broadcast(nn.Module):
    """The sum of one token and of many."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, token: Tensor, tokens: Tensor) -> Tensor:
        return torch.relu(self.norm(token + tokens))


def test_value_that_is_broadcast_is_not_continued() -> None:
    gm = fx.symbolic_trace(Broadcast())
    specs = tensor_specs((torch.rand(2, 1, 4), torch.rand(2, 5, 4)))
    shapes = propagate_symbolic(gm, specs, {})
    members = {"add", "norm", "relu"}
    assert continued_value(gm, value_graph(gm.graph), shapes, "relu", members) == ("tokens", members)
