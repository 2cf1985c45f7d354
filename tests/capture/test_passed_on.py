"""Arguments that a forward only passes on to children are told from those it reads, tests, or reads in a branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.capture.passed_on import Places, passed_on_arguments
from fxprune.rewriting.pruned_module import PrunedModule


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        return y if mask is None else y * mask


class PassesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(), Scale()

    def forward(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        y = x + self.first(x * 2, mask)
        return y + self.second(y * 3, mask=mask)


class Reads(PassesOn):
    def forward(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        return x + self.first(x, mask) + (0 if mask is None else mask.sum())


class Branches(PassesOn):
    def forward(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        return self.first(x, mask) if mask is None else self.first(2 * x, mask)


class PassesInAList(PassesOn):
    def forward(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        first: Any = self.first
        return first([x, mask])


@pytest.mark.parametrize(
    ("kind", "paths", "found"),
    [
        (PassesOn, ["first", "second"], {"mask": [(0, 1), (1, "mask")], "pos": []}),
        (Reads, ["first"], {"pos": []}),
        (Branches, ["first"], {"pos": []}),
        (PassesInAList, ["first"], {"pos": []}),
        (PassesOn, ["first"], {}),
    ],
)
def test_only_what_is_passed_on_is_found(kind: type[nn.Module], paths: list[str], found: dict[str, Places]) -> None:
    assert passed_on_arguments(kind(), ["mask", "pos"], paths) == found


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PassesOn(), PassesOn()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask=self.mask() if self.training else None)
        return self.head(x)

    def mask(self) -> Tensor:
        return torch.linspace(0, 1, 8)


def test_a_pruned_layer_takes_the_mask_that_only_a_training_makes() -> None:
    model = Model().eval()
    images = torch.rand(4, 8)

    def cheap(region: Any, _: Any) -> float:
        return 0.0 if region.name.startswith("layers.1.second") else 1.0

    analysis = fxprune.analyze(model, [images], criterion=cheap, loss=lambda module, x: module(x).square().mean())
    pruned: Any = fxprune.apply(model, analysis.plan(0.1))
    assert isinstance(pruned.layers[1], PrunedModule)
    x, mask = images, model.mask()
    layer: Any = model.layers[1]
    assert torch.equal(pruned.layers[1](x, mask=mask), x + layer.first(x * 2, mask))
    assert not torch.equal(pruned.layers[1](x, mask=mask), pruned.layers[1](x))
    pruned.train()(x).sum().backward()
