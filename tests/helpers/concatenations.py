"""Small graphs with concatenations, and the steps that tests of their clean-up share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.capture.channels import channels_of
from fxprune.capture.module_trace import Traced, trace_module
from fxprune.passes.concat import deduplicate_concat

EXACT = 1e-12
"""What rounding may change in float64, of values around 1."""


def traced(model: nn.Module) -> Any:
    found = trace_module(model, frozenset(), fixed_opaque=True)
    assert isinstance(found, Traced)
    return found.gm


def narrow(gm: fx.GraphModule, model: nn.Module | None = None) -> bool:
    return deduplicate_concat(gm, channels_of(gm), model).modified


def distance(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    assert first.dtype == second.dtype
    return float((first - second).detach().abs().max())


def image(channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


class Joining(nn.Module):
    """Values of the given widths, concatenated as `order` says (from 1) and read by `reader`.

    Every other one is the right half of a wider one. Where a number is negative, the value is added to itself.
    """

    def __init__(self, widths: Sequence[int], order: Sequence[int], reader: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.order = tuple(order)
        layers = [nn.Conv2d(3, width * (1 + index % 2), 1) for index, width in enumerate(widths)]
        self.layers = nn.ModuleList(layers)
        self.reader: Any = reader(sum(widths[abs(number) - 1] for number in order))

    def values(self, x: Tensor) -> Any:
        return [
            layer(x).chunk(2, 1)[1] if index % 2 else functional.relu(layer(x))
            for index, layer in enumerate(self.layers)
        ]

    def forward(self, x: Tensor) -> Tensor:
        values = self.values(x)
        joined = [values[n - 1] if n > 0 else values[-n - 1] + values[-n - 1] for n in self.order]
        return self.reader(torch.cat(joined, 1))


def plain(channels: int) -> nn.Module:
    return nn.Conv2d(channels, 4, 3, padding=1)
