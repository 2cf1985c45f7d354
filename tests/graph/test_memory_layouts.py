"""Regions whose stand-in lies in memory in another order than their exit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.capture.module_trace import Traced, trace_module
from fxprune.graph import memory_layouts
from fxprune.graph.records import Region, Rejection
from fxprune.graph.region_finder import find_regions
from fxprune.graph.symbolic_shapes import propagate_symbolic, tensor_specs
from fxprune.rewriting.pruned_module import PassThrough
from tests.helpers.models import finite
from tests.helpers.removals import plan_for

BATCH = torch.rand(2, 3, 12, 10)


class Tokens(nn.Module):
    """A linear layer on a permuted map, then a reshape of it by `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem, self.mix, self.head = how, nn.Conv2d(3, 6, 3), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.stem(x).permute(0, 2, 3, 1))
        if self.how == "contiguous":
            x = x.contiguous()
        x = x.reshape(-1, 6) if self.how == "reshape" else x.view(-1, 6)
        return self.head(x)


class TwoMixes(nn.Module):
    """Two linear layers in a row, then a view: one of them may go, both may not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = (
            nn.Conv2d(3, 6, 3),
            *(nn.Linear(6, 6) for _ in range(2)),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.second(self.first(self.stem(x).permute(0, 2, 3, 1))))
        return self.head(x.view(-1, 6))


class Sum(nn.Module):
    """The sum of two maps of other channels than the image; its layout is that of its first operand."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.shortcut, self.head = nn.Conv2d(3, 6, 1), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        total = self.shortcut(pixels) + self.tokens(x).permute(0, 2, 3, 1)
        return self.head(total.view(-1, 6))


class Ends(nn.Module):
    """A linear layer on a permuted map, whose output is the output of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.stem(x).permute(0, 2, 3, 1)).flatten(1, 2)


class Contiguous(nn.Module):
    """What a removed layer becomes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


def loss(network: nn.Module, batch: Tensor) -> Tensor:
    return network(batch).square().mean()


def plan_of(model: nn.Module, names: set[str]) -> fxprune.Plan:
    return plan_for(fxprune.analyze(model, [BATCH], loss=loss, criterion="l1"), names)


def assert_same_without(model: nn.Module, names: set[str]) -> None:
    """The model without some layers gives what it gives with `contiguous` calls in their place."""
    pruned, expected = fxprune.apply(model, plan_of(model, names)), copy.deepcopy(model)
    for name in names:
        expected.set_submodule(name, Contiguous())
        assert isinstance(pruned.get_submodule(name), (PassThrough, nn.Identity))
    torch.testing.assert_close(pruned(BATCH), expected(BATCH))


def regions_of(model: nn.Module, batch: Tensor = BATCH) -> tuple[dict[str, Region], dict[str, Rejection]]:
    traced = trace_module(model, frozenset())
    assert isinstance(traced, Traced)
    found, rejections = find_regions("", traced.gm, propagate_symbolic(traced.gm, tensor_specs((batch,)), {}))
    return {region.name: region for region in found}, {rejection.name: rejection for rejection in rejections}


class Turned(nn.Module):
    """Layers whose value, transposed, can be viewed where their input cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.back, self.head = (
            nn.Linear(12, 6),
            nn.Linear(6, 8),
            nn.Conv1d(8, 6, 1),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.mix(self.stem(x)).transpose(1, 2)).transpose(1, 2)
        return self.head(x.transpose(1, 2).view(6 * x.shape[0], -1).mean(1).view(-1, 6))


def test_region_whose_removal_breaks_a_view_gets_a_contiguous_stand_in() -> None:
    regions, rejections = regions_of(Tokens("view"))
    assert (regions["mix"].stand_in, regions["mix"].nodes) == ("permute", ("mix",))
    assert regions["mix"].contiguous
    assert "mix" not in rejections


def test_region_is_rejected_if_its_readers_cannot_work_with_a_contiguous_stand_in_either() -> None:
    regions, rejections = regions_of(Turned(), torch.rand(2, 5, 12))
    assert not regions
    reason = rejections["mix..back"].reason
    assert "'stem' has another memory layout than 'transpose_1', and 'view' cannot work with it" in reason


@pytest.mark.parametrize("how", ["reshape", "contiguous"])
def test_region_stays_where_the_readers_work_with_both_layouts(how: str) -> None:
    model = Tokens(how).eval()
    regions, _ = regions_of(model)
    assert regions["mix"].nodes == ("mix",)  # with `contiguous` in it, the view would fail
    analysis = fxprune.analyze(model, [BATCH], loss=lambda network, batch: network(batch).square().mean())
    assert fxprune.apply(model, analysis.plan(1e-6, cost="blocks"))(BATCH).shape == (160, 2)


def test_of_regions_that_break_a_view_only_together_one_gets_a_contiguous_stand_in() -> None:
    regions, _ = regions_of(TwoMixes())
    assert {name: region.contiguous for name, region in regions.items()} == {"first": True, "second": False}
    model = TwoMixes().eval()
    pruned = fxprune.apply(model, plan_of(model, {"first", "second"}))
    expected = model.head(model.stem(BATCH).permute(0, 2, 3, 1).reshape(-1, 6))
    torch.testing.assert_close(pruned(BATCH), expected)


def test_drop_whose_remaining_operand_cannot_be_viewed_gets_it_contiguous() -> None:
    regions, _ = regions_of(Sum())
    assert {name: region.contiguous for name, region in regions.items()} == {"tokens": False, "shortcut": True}
    model = Sum().eval()
    pruned = fxprune.apply(model, plan_of(model, {"shortcut"}))
    expected = model.head(model.tokens(BATCH).permute(0, 2, 3, 1).reshape(-1, 6))
    torch.testing.assert_close(pruned(BATCH), expected)


def test_layout_that_leaves_the_graph_stays_contiguous() -> None:
    regions, _ = regions_of(Ends())
    assert regions["mix"].contiguous


class EagerTokens(Tokens):
    """A model that is no graph: the layer that is removed is one, alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(finite(x))


@pytest.mark.parametrize("kind", [Tokens, EagerTokens])
@pytest.mark.parametrize("criterion", ["fisher", "fisher_mended", "l1"])
def test_pruned_model_calls_contiguous_where_the_layer_was(kind: type[Tokens], criterion: str) -> None:
    model = kind("view").eval()
    pruned = fxprune.compile(model, [BATCH], budget=0.1, loss=loss, criterion=criterion, heal="none")
    assert repr(pruned.mix) == "PassThrough(returns='input', contiguous)"
    expected = model.head(model.stem(BATCH).permute(0, 2, 3, 1).contiguous().view(-1, 6))
    torch.testing.assert_close(pruned(BATCH), expected, rtol=0, atol=0)


class ThreeMixes(nn.Module):
    """Three linear layers in a row, each followed by a view of its value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)
        self.mixes = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        total: Tensor | int = 0
        for mix in self.mixes:
            x = mix(x)
            total = total + x.view(-1, 6)
        return self.head(total)


@pytest.mark.parametrize("names", [{"mixes.0"}, {"mixes.1"}, {"mixes.0", "mixes.1"}])
def test_stand_in_is_contiguous_for_all_regions_in_a_row(names: set[str]) -> None:
    assert_same_without(ThreeMixes().eval(), names)


def test_equal_layouts_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("computed again")

    monkeypatch.setattr(memory_layouts, "_follow", refuse)
    blocks = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    regions, _ = regions_of(blocks)
    assert set(regions) == {"1"}
