"""Layers that change nothing are removed, others are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from fxprune.passes.dead_code import remove_dead_code
from fxprune.passes.identity_ops import remove_identity_ops
from tests.helpers.concatenations import image, traced

# Idle layers ----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Steps between two convolutions."""

    def __init__(self, *steps: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.layers = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * 9
        layers = iter(self.layers)
        for step in self.steps:
            x = (next(layers) if isinstance(step, nn.Module) else step)(x)
        return self.last(x)


SPARE: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "relu twice": ((nn.ReLU(inplace=True), nn.ReLU()), ["ReLU"]),
    "relu, however written": ((lambda x: x.relu_(), torch.relu, nn.ReLU(), functional.relu), ["relu"]),
    "relu6 twice": ((nn.ReLU6(), functional.relu6), ["ReLU6"]),
    "relu of relu6": ((nn.ReLU6(), nn.ReLU()), ["ReLU6"]),
    "relu6 of relu": ((nn.ReLU(), nn.ReLU6()), ["ReLU6"]),
    "hardtanh in hardtanh": ((nn.Hardtanh(-2, 3), functional.hardtanh, nn.Hardtanh(-2, 3)), ["hardtanh"]),
    "nothing": ((nn.Identity(), nn.ReLU(), nn.Dropout(0.0), nn.Dropout2d(0.0)), ["ReLU"]),
    "no depth": ((StochasticDepth(0.0, "row"), nn.ReLU()), ["ReLU"]),
}
BUSY: dict[str, tuple[Any, ...]] = {
    "others between": (nn.ReLU(), lambda x: x - 1, nn.ReLU()),
    "ranges that overlap": (nn.Hardtanh(-1, 1), nn.ReLU()),
    "not idempotent": (nn.SiLU(), nn.SiLU()),
    "dropout": (nn.Dropout(0.5), StochasticDepth(0.2, "row")),
    "leaky": (nn.ReLU(), nn.LeakyReLU(), nn.Softplus()),
}


def between(gm: fx.GraphModule) -> list[str]:
    names = [
        type(gm.get_submodule(str(node.target))).__name__
        if node.op == "call_module"
        else str(getattr(node.target, "__name__", node.target))
        for node in gm.graph.nodes
    ]
    return [name for name in names if name not in ("x", "mul", "Conv2d", "output")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SPARE)
def test_remove_identity_ops_removes_idle_layers(name: str, training: bool) -> None:
    steps, left = SPARE[name]
    model = Stack(*steps).train(training)
    gm = traced(model)
    assert remove_identity_ops(gm).modified
    remove_dead_code(gm)
    assert between(gm) == left
    x = image(dtype=torch.float32)
    assert torch.equal(gm(x), model(x))
    assert gm.first.weight is model.first.weight
    (found,), (expected,) = (torch.autograd.grad(m(x).square().sum(), model.first.weight) for m in (gm, model))
    assert torch.equal(found, expected)
    assert float(found.abs().sum()) > 0


@pytest.mark.parametrize("name", BUSY)
def test_remove_identity_ops_keeps_other_layers(name: str) -> None:
    gm = traced(Stack(*BUSY[name]))
    before = between(gm)
    assert not remove_identity_ops(gm).modified
    assert between(gm) == before


def test_remove_identity_ops_keeps_values_read_twice() -> None:
    """With ``relu6`` reading past ``relu``, both would be left."""
    model = Stack(nn.ReLU(), lambda x: functional.relu6(x) + x)
    gm = traced(model)
    assert not remove_identity_ops(gm).modified


def test_remove_identity_ops_keeps_outputs_and_hooked_layers() -> None:
    model = Stack(nn.ReLU(), nn.Identity())
    seen: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    gm = traced(model)
    assert not remove_identity_ops(gm).modified
    gm(image(dtype=torch.float32))
    assert len(seen) == 1
    ends = traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity()))
    assert not remove_identity_ops(ends).modified
