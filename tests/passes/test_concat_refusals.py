"""Layers that are not narrowed, because the result would not be exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from fxprune.capture.module_trace import Traced, trace_module
from fxprune.passes.concat import NARROWED_WEIGHTS, deduplicate_concat
from tests.helpers.concatenations import Joining, image, narrow, plain, traced

# Left alone ----------------------------------------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    """Not linear in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight / self.weight.abs().sum((1, 2, 3), keepdim=True)
        return functional.conv2d(input, weight, self.bias, padding=1)


class Calling(Joining):
    """Reads the concatenation in a way of its own."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], reader: Callable[[int], nn.Module] = plain) -> None:
        super().__init__([2, 3], [1, 2, 2], reader)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.values(x)
        return self.read(self.reader, torch.cat([first, second, second], 1))


class Twice(Joining):
    """Reads two concatenations by one layer; they hold the same values, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.values(x)
        return self.reader(torch.cat([first, second, second], 1)) + self.reader(torch.cat([second, second, first], 1))


def hooked(channels: int) -> nn.Module:
    """The older way to normalize a weight: before every call, from two others."""
    return torch.nn.utils.weight_norm(plain(channels))


ALONE: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: Joining([2, 2], [1, 2, 2, 2], lambda n: nn.Conv2d(n, 4, 3, groups=2)),
    "depthwise": lambda: Joining([2, 2], [1, 2, 2, 2], lambda n: nn.Conv2d(n, n, 3, groups=n)),
    "derived": lambda: Joining([2, 3], [1, 2, 2], lambda n: Standardized(n, 4, 3)),
    "parametrized": lambda: Joining([2, 3], [1, 2, 2], lambda n: parametrizations.weight_norm(plain(n))),
    "normalized": lambda: Joining([2, 3], [1, 2, 2], hooked),
    "linear": lambda: Calling(lambda read, x: read(x.flatten(1)), lambda n: nn.Linear(n * 42, 4)),
    "norm": lambda: Calling(lambda read, x: read(x), lambda n: nn.Sequential(nn.BatchNorm2d(n), plain(n))),
    "called twice": lambda: Twice([2, 3], [1, 2, 2], plain),
    "read elsewhere": lambda: Calling(lambda read, x: read(x) + x.sum()),
    "given": lambda: Calling(lambda read, x: torch.cat([read(x), x], 1)),
    "no value twice": lambda: Joining([2, 3], [2, 1], plain),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ALONE)
def test_deduplicate_concat_leaves_inexact_cases_alone(name: str) -> None:
    model = ALONE[name]().double().eval()
    gm = traced(model)
    before = gm.code
    assert not narrow(gm)
    assert gm.meta[NARROWED_WEIGHTS] == {}
    assert gm.code == before
    assert torch.equal(gm(image()), model(image()))


def test_unknown_layer_is_not_narrowed() -> None:
    model = Joining([2, 3], [1, 2, 2], lambda n: Standardized(n, 4, 3)).double()
    found = trace_module(model, frozenset({"reader"}), fixed_opaque=True)
    assert isinstance(found, Traced)
    assert [node.op for node in found.gm.graph.nodes][-2] == "call_module"
    assert not narrow(found.gm)
    assert torch.equal(found.gm(image()), model(image()))


def test_concatenation_of_rows_is_not_narrowed() -> None:
    class Rows(Joining):
        dim = 2

        def forward(self, x: Tensor) -> Tensor:
            (value,) = self.values(x)
            return self.reader(torch.cat([value, value], self.dim))

    for dim, x in ((2, image()), (0, image()), (1, image()[0]), (-3, image())):
        model = Rows([3], [1] if dim >= 0 else [1, 1], plain).double()
        model.dim = dim
        gm = traced(model)
        assert not narrow(gm)
        assert torch.equal(gm(x), model(x))


def test_unknown_width_is_not_guessed() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = plain(9)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.reader(torch.cat([x, y, y], 1))

    gm = traced(Given())
    assert not narrow(gm)
    assert deduplicate_concat(gm, {"x": 1, "y": 4}).modified
    wrong = traced(Given())
    assert not deduplicate_concat(wrong, {"x": 1, "y": 2}).modified  # 5 is not 9


def test_shared_weight_is_not_narrowed() -> None:
    model = nn.Module()
    model.part = Joining([2, 3], [1, 2, 2], plain)
    model.other = plain(8)
    gm = traced(model.part)
    model.other.weight = model.part.reader.weight
    assert not narrow(gm, model)
    assert narrow(gm)
    assert model.other.weight.shape == (4, 8, 3, 3)


def test_layer_used_elsewhere_is_not_narrowed() -> None:
    model = nn.Module()
    model.part = Joining([2, 3], [1, 2, 2], plain)
    model.again = model.part.reader
    gm = traced(model.part)
    assert not narrow(gm, model)
