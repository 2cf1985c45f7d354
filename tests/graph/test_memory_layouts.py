"""Regions whose stand-in lies in memory in another order than their exit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.capture.module_trace import Traced, trace_module
from fxprune.errors import NoRegionError
from fxprune.graph import memory_layouts
from fxprune.graph.records import Region, Rejection
from fxprune.graph.region_finder import find_regions
from fxprune.graph.symbolic_shapes import propagate_symbolic, tensor_specs

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


def regions_of(model: nn.Module, batch: Tensor = BATCH) -> tuple[dict[str, Region], dict[str, Rejection]]:
    traced = trace_module(model, frozenset())
    assert isinstance(traced, Traced)
    found, rejections = find_regions("", traced.gm, propagate_symbolic(traced.gm, tensor_specs((batch,)), {}))
    return {region.name: region for region in found}, {rejection.name: rejection for rejection in rejections}


def test_region_whose_removal_breaks_a_view_is_rejected_with_the_view_as_reason() -> None:
    regions, rejections = regions_of(Tokens("view"))
    assert "mix" not in regions
    assert "'permute' has another memory layout than 'mix', and 'view' cannot work with it" in rejections["mix"].reason


@pytest.mark.parametrize("how", ["reshape", "contiguous"])
def test_region_stays_where_the_readers_work_with_both_layouts(how: str) -> None:
    model = Tokens(how).eval()
    regions, _ = regions_of(model)
    assert regions["mix"].nodes == ("mix",)  # with `contiguous` in it, the view would fail
    analysis = fxprune.analyze(model, [BATCH], loss=lambda network, batch: network(batch).square().mean())
    assert fxprune.apply(model, analysis.plan(1e-6, cost="blocks"))(BATCH).shape == (160, 2)


def test_regions_that_break_a_view_only_together_are_not_both_offered() -> None:
    regions, rejections = regions_of(TwoMixes())
    assert set(regions) == {"second"}
    assert "memory layout" in rejections["first"].reason


def test_drop_whose_remaining_operand_cannot_be_viewed_is_rejected() -> None:
    regions, rejections = regions_of(Sum())
    assert "tokens" in regions
    assert "shortcut" not in regions
    assert "memory layout" in rejections["shortcut"].reason


def test_layout_that_leaves_the_graph_stays_contiguous() -> None:
    regions, rejections = regions_of(Ends())
    assert "mix" not in regions
    assert "code outside may need it to be contiguous" in rejections["mix"].reason


def test_part_called_on_a_permuted_value_between_python_code_keeps_its_layout() -> None:
    class Eager(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            if not bool(x.isfinite().all()):  # what keeps the model from being one graph
                raise ValueError("not finite")
            return super().forward(x)

    with pytest.raises(NoRegionError, match="memory layout than 'linear'"):
        fxprune.analyze(Eager("view"), [BATCH], loss=lambda network, batch: network(batch).square().mean())


def test_equal_layouts_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("computed again")

    monkeypatch.setattr(memory_layouts, "_follow", refuse)
    blocks = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    regions, _ = regions_of(blocks)
    assert set(regions) == {"1"}
