"""Linear maps that replace a region: compared with least squares, and which layers can absorb them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxprune
from fxprune.attribution import linear_recovery
from fxprune.attribution.linear_recovery import (
    MAX_PLACES,
    GramInterpreter,
    GramSums,
    LinearMap,
    linearly_absorbable,
    solve_linear_maps,
)
from fxprune.graph.records import RESULTS, Link, Region
from tests.helpers.captures import capture_copy
from tests.helpers.models import Detector, build, labelled, pixels

# The nearest map -----------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """`mix` is linear in its input, `bend` is not; both can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bend = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.last, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.bend(self.mix(self.stem(x)))).relu().mean((2, 3)))


def sums_of(gm: fx.GraphModule, regions: Sequence[Region], images: Sequence[Tensor]) -> GramSums:
    sums: GramSums = {}
    with torch.no_grad():
        for image in images:
            GramInterpreter(gm, regions, sums).run(image)
    return sums


def test_maps_equal_least_squares_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Mixing)
    _, (island,) = capture_copy(model, x := pixels(2, 3, 16, 16), whole_model_is_graph=True)
    regions = [
        r for r in [row.region for row in fxprune.analyze(model, labelled()).regions] if r.name in ("mix", "bend")
    ]
    images = [x, pixels(3, 3, 12, 12, seed=1)]
    sums = sums_of(island.gm, regions, images)
    held = solve_linear_maps(sums)
    monkeypatch.setattr(linear_recovery, "RELATIVE_RIDGE", 1e-12)
    free = solve_linear_maps(sums)
    assert isinstance(model, Mixing)
    with torch.no_grad():
        stems = [model.stem(image) for image in images]
        torch.testing.assert_close(free["mix"](stems[0]), model.mix(stems[0]), rtol=1e-3, atol=1e-3)
        mixed = [model.mix(stem) for stem in stems]
        given, wanted = (
            torch.cat([value.movedim(1, -1).reshape(-1, 8) for value in values]).double().numpy()
            for values in (mixed, map(model.bend, mixed))
        )
    rows = np.concatenate([given, np.ones((len(given), 1))], 1)
    exact, *_ = np.linalg.lstsq(rows, wanted - given)
    found = free["bend"](torch.from_numpy(given).float()).numpy() - given
    np.testing.assert_allclose(found, rows @ exact, atol=1e-2 * np.abs(wanted - given).max())
    assert 0 < held["bend"].matrix.norm() < free["bend"].matrix.norm()


def test_large_feature_maps_are_sampled() -> None:
    model = build(Mixing)
    _, (island,) = capture_copy(model, x := pixels(1, 3, 96, 96), whole_model_is_graph=True)
    regions = [r for r in [row.region for row in fxprune.analyze(model, labelled()).regions] if r.name == "mix"]
    gram, _ = sums_of(island.gm, regions, [x, x[..., :16, :16]])["mix"]
    assert float(gram[-1, -1]) == MAX_PLACES + 256


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 7, 4), (3, 4)])
def test_linear_map_acts_on_the_channels(shape: tuple[int, ...]) -> None:
    value, weight, bias = pixels(*shape), pixels(4, 4, seed=1), pixels(4, seed=2)
    found = LinearMap(torch.cat([weight.T, bias[None]]))(value)
    rows = value.movedim(1, -1) if value.ndim == 4 else value
    wanted = rows + rows @ weight.T + bias
    torch.testing.assert_close(found, wanted.movedim(-1, 1) if value.ndim == 4 else wanted)


# Who takes it in -----------------------------------------------------------------------------------------------------


class Reading(nn.Module):
    def __init__(self, read: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.region, self.read = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), read
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.region(self.stem(x)), *self.layers)


CONV = partial(nn.Conv2d, 8, 8, 3)
POOLED = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5)]
READERS: dict[str, tuple[bool, Callable[..., Tensor], Sequence[nn.Module]]] = {
    "a convolution": (True, lambda y, conv: conv(y), [CONV()]),
    "a depthwise one": (False, lambda y, conv: conv(y), [CONV(groups=8)]),
    "an activation": (False, lambda y, conv: conv(y.relu()), [CONV()]),
    "an activated norm": (False, lambda y, norm, conv: conv(norm(y).relu()), [nn.BatchNorm2d(8), CONV()]),
    "a norm": (True, lambda y, norm, conv: conv(norm(y)), [nn.BatchNorm2d(8), CONV()]),
    "a sum": (True, lambda y, conv, other: other(y + conv(y)), [CONV(padding=1), CONV()]),
    "two, one of them not": (False, lambda y, conv: conv(y).mean() + y.sigmoid().mean(), [CONV()]),
    "a concatenation": (True, lambda y, conv: conv(torch.cat([y, y], 1)), [nn.Conv2d(16, 8, 1)]),
    "what is larger": (True, lambda y, conv: conv(functional.interpolate(y, scale_factor=2.0)), [CONV()]),
    "a linear layer": (True, lambda y, fc: fc(y.mean((2, 3))), [nn.Linear(8, 5)]),
    "a linear layer of tokens": (False, lambda y, fc: fc(y), [nn.Linear(8, 5)]),
    "one of moved channels": (False, lambda y, fc: fc(y.flatten(2).transpose(1, 2)), [nn.Linear(8, 5)]),
    "one behind modules": (True, lambda y, pool, flat, drop, fc: fc(drop(flat(pool(y)))), POOLED),
    "a shuffle": (True, lambda y, conv: conv(y.view(2, 2, 4, 9, 9).transpose(1, 2).reshape(2, 8, 9, 9)), [CONV()]),
    "a maximum": (False, lambda y, pool, conv: conv(pool(y)), [nn.MaxPool2d(2), CONV()]),
    "an average": (True, lambda y, pool, conv: conv(pool(y)), [nn.AvgPool2d(2), CONV()]),
    "whoever called": (False, lambda y: y, []),
}


REGION = fxprune.analyze(build(Detector), labelled(), criterion="random").regions[0].region


def taken_in(name: str, graphs: list[tuple[str, fx.GraphModule]], links: Sequence[Link]) -> bool:
    region = replace(REGION, island="", exit=name)
    return list(linearly_absorbable(graphs, links, [region])) == [region]


@pytest.mark.parametrize("reader", READERS)
def test_layers_that_can_absorb_a_map_are_found(reader: str) -> None:
    expected, read, layers = READERS[reader]
    gm = fx.symbolic_trace(Reading(read, *layers))
    assert taken_in("region", [("", gm)], [Link("", RESULTS)]) == expected


def test_readers_in_other_graphs_are_followed() -> None:
    whole = fx.symbolic_trace(Reading(lambda y: y))
    conv, act = (fx.symbolic_trace(nn.Sequential(layer)) for layer in (nn.Conv2d(8, 8, 1), nn.ReLU()))
    graphs = [("", whole), ("conv", conv), ("act", act)]
    assert taken_in("region", graphs, [Link("", "conv"), Link("conv", RESULTS)])
    assert not taken_in("region", graphs, [Link("", "conv"), Link("", "act")])
    assert not taken_in("region", graphs, [Link("", "conv"), Link("", RESULTS)])
    assert not taken_in("region", graphs, [])


# As a criterion ------------------------------------------------------------------------------------------------------


def test_region_that_a_linear_map_replaces_has_no_importance() -> None:
    model = build(Mixing)
    plain, mended = (
        {r.name: r.score for r in fxprune.analyze(model, labelled(), criterion=name).regions}
        for name in ("fisher", "fisher_mended")
    )
    assert plain.keys() == mended.keys()
    assert mended["mix"] < 1e-6 * plain["mix"]
    assert 0 < mended["bend"] < plain["bend"]


def test_generator_is_read_once_and_graphs_between_python_are_followed() -> None:
    batches = iter(labelled())
    found = fxprune.analyze(build(Detector), batches, criterion="fisher_mended")
    assert list(batches) == []
    assert {region.name: region.score > 0 for region in found.regions} == {
        f"body.{index}": True for index in range(1, 5)
    } | {"head.0": True}
