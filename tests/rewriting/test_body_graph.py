"""Graphs of single forwards: what they take, what their children stay, and what they refuse."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.capture.module_trace import Traced, trace_module
from fxprune.capture.tracer import TRACED_CALL, TracedCall
from fxprune.rewriting.body_graph import BodyError, build_body, nested_calls, produced_values, received_values
from tests.helpers.models import pixels

X = pixels(2, 4, 5, 5)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.conv(x)
        return y * 2, {"half": y / 2}


class Middle(nn.Module):
    """Takes containers and an option, and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = Inner(), nn.Parameter(torch.ones(1))

    def forward(self, pair: list[Tensor], *, more: dict[str, Tensor], factor: float = 1.0) -> list[Tensor]:
        first, second = pair
        double, others = self.inner(first + more["third"])
        return [double * self.scale * factor, second + others["half"]]


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle, self.head = Middle(), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.middle([x, x * 2], more={"third": x - 1}, factor=0.5)
        return self.head(first + second)


def calls_of(model: nn.Module) -> dict[str, TracedCall]:
    traced = trace_module(model, ())
    assert isinstance(traced, Traced)
    return {call.path: call for call in nested_calls(traced.gm.meta[TRACED_CALL])}


def test_body_takes_and_returns_what_the_module_does() -> None:
    model = Outer()
    call = calls_of(model)["middle"]
    body = build_body(model, call)
    gm = fx.GraphModule(model.middle, body.graph)
    arguments: tuple[Any, dict[str, Any]] = ([X, X * 2], {"more": {"third": X - 1}, "factor": 0.5})
    expected = model.middle(arguments[0], **arguments[1])
    assert all(torch.equal(a, b) for a, b in zip(gm(arguments[0], **arguments[1]), expected, strict=True))
    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == ["inner"]


@pytest.mark.parametrize(("path", "layers"), [("", ["middle.inner.conv", "head"]), ("middle", ["inner.conv"])])
def test_inlined_children_leave_their_layers(path: str, layers: list[str]) -> None:
    model = Outer()
    body = build_body(model, calls_of(model)[path], {"middle", "middle.inner"})
    assert [node.target for node in body.graph.nodes if node.op == "call_module"] == layers


def test_body_of_everything_computes_the_same() -> None:
    model = Outer()
    body = build_body(model, calls_of(model)[""], {"middle", "middle.inner"})
    assert torch.equal(fx.GraphModule(model, body.graph)(X), model(X))


def test_values_of_a_call() -> None:
    calls = calls_of(Outer())
    outside = produced_values(calls["middle"])
    inside = produced_values(calls["middle"], {"middle.inner"})
    assert outside < inside
    assert received_values(calls["middle"]) == {"x", "mul", "sub"}
    assert not inside & received_values(calls["middle"])


class Both(NamedTuple):
    a: Tensor
    b: Tensor


class NamedPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Both:
        return Both(self.conv(x), x)


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + y


class Starred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, *values: Tensor) -> Tensor:
        return self.conv(values[0]) + values[1]


class Calling(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.part, NamedPair):
            return self.part(x).a
        return self.part(x, x)


@pytest.mark.parametrize(
    ("part", "words"),
    [(NamedPair, "passes on a Both"), (Same, "receives the value 'x' twice"), (Starred, "'values' collects several")],
)
def test_forwards_that_are_no_graph_of_their_own_are_refused(part: type[nn.Module], words: str) -> None:
    model = Calling(part())
    with pytest.raises(BodyError, match=words):
        build_body(model, calls_of(model)["part"])
