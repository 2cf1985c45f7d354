"""Regions extracted from a captured model as modules, single and repeated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models import resnet18

import fxprune
from fxprune.graph.interpreters import Graphs
from fxprune.graph.records import Island
from fxprune.profiling.region_modules import RegionModule, extract_regions
from tests.helpers.captures import capture_copy
from tests.helpers.models import Block, Detector, build, pixels, tiny

X = pixels(2, 3, 16, 16)


def pieces_of(
    model: nn.Module, x: Tensor = X, root: bool = True
) -> tuple[dict[str, RegionModule], list[Island], nn.Module]:
    """Every region of a model as a piece, by name; the islands, and the model with these in place."""
    analysis = fxprune.analyze(model, [(x, torch.arange(len(x)))], criterion="l1")
    regions = [row.region for row in analysis.regions]
    twin, islands = capture_copy(without_inplace(model), x, root)
    with torch.no_grad():
        pieces = extract_regions(partial(twin, x), Graphs.of(twin, islands), regions)
    assert [piece.region for piece in pieces] == [region.name for region in regions]
    return {piece.region: piece for piece in pieces}, islands, twin


def without_inplace(model: nn.Module) -> nn.Module:
    """A copy of a model whose layers overwrite nothing, so that values can be compared after a run."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return twin


def values_of(islands: list[Island], x: Any) -> dict[tuple[str, str], Any]:
    """Values of the nodes of islands that follow one another."""
    values: dict[tuple[str, str], Any] = {}
    for island in islands:
        interpreter = fx.Interpreter(island.gm, garbage_collect_values=False)
        x = interpreter.run(x)
        values |= {(island.name, node.name): found for node, found in interpreter.env.items()}
    return values


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=5).eval()


@pytest.mark.parametrize("make", [tiny, partial(build, Detector), resnet], ids=["graph", "islands", "drops"])
@torch.no_grad()
def test_region_module_gives_the_outputs_of_its_region(make: Callable[[], nn.Module]) -> None:
    model = make()
    x = pixels(2, 3, 64, 64) if make is resnet else X
    with torch.enable_grad():
        regions = fxprune.analyze(model, [(x, torch.arange(2))], criterion="l1").regions
        pieces, islands, _ = pieces_of(model, x)
    assert {region.kind for region in regions} == ({"bypass", "drop"} if make is resnet else {"bypass"})
    values = values_of(islands, x)
    for region in regions:
        piece = pieces[region.name]
        (call,) = piece.calls
        torch.testing.assert_close(piece.module(*call), values[region.island, region.exit])
        assert torch.equal(call[piece.stand_in], values[region.island, region.stand_in])
        assert sum(parameter.numel() for parameter in piece.module.parameters()) == region.params
        module, given = piece.chained(1)
        torch.testing.assert_close(module(*given), (values[region.island, region.exit],))


@pytest.mark.parametrize("make", [tiny, resnet], ids=["bypasses", "drops"])
@torch.no_grad()
def test_repeated_region_module_feeds_each_copy_to_the_next(make: Callable[[], nn.Module]) -> None:
    with torch.enable_grad():
        pieces, _, _ = pieces_of(make(), pixels(2, 3, 64, 64))
    for piece in pieces.values():
        (call,) = piece.calls
        expected = call[piece.stand_in]
        for _ in range(3):
            expected = piece.module(*(expected if i == piece.stand_in else value for i, value in enumerate(call)))
        module, given = piece.chained(3)
        torch.testing.assert_close(module(*given), (expected,))
        assert sum(p.numel() for p in module.parameters()) == 3 * sum(p.numel() for p in piece.module.parameters())


class Twice(nn.Module):
    """Runs the same captured modules once for each half of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        halves = [half for half in x.chunk(2, -1) if bool(torch.isfinite(half).all())]
        return self.fc(torch.stack([self.body(half).mean((2, 3)) for half in halves]).sum(0))


@torch.no_grad()
def test_region_module_is_called_as_often_as_in_the_model() -> None:
    with torch.enable_grad():
        pieces, _, _ = pieces_of(build(Twice))
    piece = pieces["body.1"]
    assert [tuple(value.shape for value in values) for values in piece.calls] == [((2, 8, 16, 8),)] * 2
    module, given = piece.chained(2)
    expected = [piece.module(piece.module(*call)) for call in piece.calls]
    torch.testing.assert_close(module(*given), tuple(expected))


def test_equal_regions_have_one_kind() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            narrow, wide = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, stride=2)
            self.layers = nn.Sequential(narrow, Block(4), Block(4), wide, Block(8), nn.MaxPool2d(2), Block(8))
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layers(x).mean((2, 3)))

    pieces, _, _ = pieces_of(build(Mixed))
    kinds = {name: piece.work_key for name, piece in pieces.items()}
    assert kinds["layers.1"] == kinds["layers.2"]
    assert len({kinds[name] for name in ("layers.1", "layers.4", "layers.6")}) == 3, "widths and sizes differ"


def test_extract_regions_keeps_the_weights_of_the_model() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pieces, _, twin = pieces_of(model)
    module, given = pieces["blocks.0"].chained(2)
    module(*given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shared = {id(p) for p in module.parameters()} & {id(p) for p in twin.parameters()}
    assert len(shared) == sum(True for _ in pieces["blocks.0"].module.parameters())
