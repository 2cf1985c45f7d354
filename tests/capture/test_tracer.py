"""What the tracer follows, and what it refuses: contexts, values after a star, conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fxprune.capture.module_trace import Traced, Untraced, trace_module
from fxprune.capture.tracer import FunctionalTracer
from fxprune.graph.records import Refusal
from tests.helpers.zoo import conv


class Written(nn.Module):
    """A module with two layers whose forward is a function ``(module, x)``."""

    def __init__(self, written: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.written, self.one, self.two = written, conv(4), nn.Sequential(conv(4), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


class Around(nn.Module):
    """Traceable around one part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part = conv(4), part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.stem(x)) + 1


# Contexts ------------------------------------------------------------------------------------------------------------


def frozen(module: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = module.two(x)
    return module.one(x)


@torch.no_grad()
def decorated(module: Written, x: Tensor) -> Tensor:
    return module.one(x)


def in_inference_mode(module: Written, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return module.one(x)


def without_autocast(module: Written, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return module.one(x.float())


def under_autocast(module: Written, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module.two(x)


def checkpointed(module: Written, x: Tensor) -> Tensor:
    return x + checkpoint(module.two, x, use_reentrant=False)


def checkpointed_reentrant(module: Written, x: Tensor) -> Tensor:
    return x + checkpoint(module.two, x, use_reentrant=True)


CONTEXTS = [
    (frozen, "enters torch.no_grad"),
    (decorated, "enters torch.no_grad"),
    (in_inference_mode, "enters torch.inference_mode"),
    (without_autocast, "enters torch.autocast"),
    (under_autocast, "enters torch.autocast"),
    (checkpointed, "enters torch.utils.checkpoint"),
    (checkpointed_reentrant, "or torch.utils.checkpoint"),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("written", "words"), CONTEXTS)
def test_forward_that_enters_a_context_stays_one_node(written: Any, words: str, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        alone, around = trace_module(Written(written), ()), trace_module(Around(Written(written)), ())
    assert isinstance(alone, Untraced)
    assert words in alone.reason
    assert isinstance(around, Traced)
    assert list(around.opaque) == ["part"]
    assert words in around.opaque["part"]


def test_context_without_operations_of_the_graph_is_no_hindrance() -> None:
    def shifted(module: Written, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = torch.arange(4.0).view(1, 4, 1, 1)
        return module.one(x) + shift

    assert isinstance(trace_module(Written(shifted), ()), Traced)


def test_trace_restores_gradient_mode_and_autocast() -> None:
    enter = torch.autocast.__enter__
    with torch.no_grad():
        trace_module(Written(frozen), ())
        assert not torch.is_grad_enabled()
    assert torch.autocast.__enter__ is enter


# Values after a star -------------------------------------------------------------------------------------------------


def heads(module: Written, x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    shape = (*rows.shape[:-1], -1, 2)
    return rows.view(shape).transpose(1, 2).reshape(*rows.shape[:1], -1, 2, 2).flatten(1) + module.one(x).mean()


def several(_: Written, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], *x.shape[2:], 1).squeeze(-1)


def whole(_: Written, x: Tensor) -> Tensor:
    return x.new_ones(*x.shape, 2)[..., 0] * x.view([*x.size(), 1]).squeeze(-1)


@pytest.mark.parametrize("written", [heads, several, whole])
def test_starred_shape_is_followed_at_every_size(written: Any) -> None:
    module = Written(written)
    gm = fx.GraphModule(module, FunctionalTracer().trace(module))
    for size in ((2, 4, 6, 8), (1, 4, 3, 5)):
        x = torch.rand(size)
        assert torch.equal(gm(x), module(x))


def test_starred_shape_fits_any_rank() -> None:
    module = Written(lambda module, x: x.reshape(*x.shape[:-1], 2, -1))
    gm = fx.GraphModule(module, FunctionalTracer().trace(module))
    for size in ((4,), (3, 4), (2, 3, 4)):
        assert gm(torch.rand(size)).shape == (*size[:-1], 2, size[-1] // 2)


MISUSES: dict[str, Callable[[Any, Any], Any]] = {
    "first of them": lambda module, x: x.view(-1, (*x.shape[:-1], 2)[0]),
    "one from the start": lambda module, x: x.expand((*x.shape[:-1], 2)[1], 4),
    "part of them": lambda module, x: x.view((*x.shape[:-1], 2, 2)[1:]),
    "arithmetic": lambda module, x: x.view(*(size * 2 for size in (*x.shape, 1))),
    "sum": lambda module, x: x.view(sum((*x.shape, 1))),
    "comparison": lambda module, x: x if (*x.shape, 1) == (*x.shape, 1) else -x,
    "function without sizes": lambda module, x: torch.add(*(*x.shape[:1], x)),
    "module": lambda module, x: module.one(*(*x.shape[:1], x)),
    "truth": lambda module, x: x if all((*x.shape, 1)) else -x,
}


@pytest.mark.parametrize("misuse", sorted(MISUSES))
def test_other_uses_of_a_starred_shape_are_refused(misuse: str) -> None:
    with pytest.raises((Refusal, TypeError)):
        FunctionalTracer().trace(Written(MISUSES[misuse]))


def test_values_without_known_length_cannot_be_starred() -> None:
    traced = trace_module(Written(lambda module, x: torch.cat([*module.one(x), x])), ())
    assert isinstance(traced, Untraced)
    assert "cannot be iterated" in traced.reason


# Conditions ----------------------------------------------------------------------------------------------------------

DECIDED: dict[str, Callable[[Any], Any]] = {
    "size(2) > 1": lambda x: x if x.size(2) > 1 else -x,
    "shape[2] != 1": lambda x: x if x.shape[2] != 1 else -x,
    "1 < shape[3]": lambda x: x if 1 < x.shape[3] else -x,  # noqa: SIM300
    "size()[1] >= 1": lambda x: x if x.size()[1] >= 1 else -x,
    "shape[1] == 0": lambda x: -x if x.shape[1] == 0 else x,
    "shape[1] <= 1": lambda x: -x if x.shape[1] <= 1 else x,
}


@pytest.mark.parametrize("name", sorted(DECIDED))
def test_size_is_taken_to_be_larger_than_one(name: str) -> None:
    graph = FunctionalTracer().trace(Written(lambda module, x: DECIDED[name](module.one(x))))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


UNDECIDED: dict[str, Callable[[Any], Any]] = {
    "batch": lambda x: x.shape[0] > 1,
    "dimension from the end": lambda x: x.shape[-1] > 1,
    "slice": lambda x: x[1:].shape[0] > 1,
    "size of a slice of sizes": lambda x: x.shape[1:][1] > 1,
    "larger number": lambda x: x.shape[2] > 2,
    "sum": lambda x: x.shape[2] + x.shape[3] > 1,
    "two sizes": lambda x: x.shape[2] > x.shape[3],
    "value": lambda x: x.sum() > 1,
    "element": lambda x: x[1] > 1,
    "finite in eval mode": lambda x: torch.isfinite(x).all(),
}


@pytest.mark.parametrize("name", sorted(UNDECIDED))
def test_other_conditions_are_refused(name: str) -> None:
    module = Written(lambda module, x: module.one(x) if UNDECIDED[name](x) else x).eval()
    with pytest.raises(fx.proxy.TraceError, match="control flow"):
        FunctionalTracer().trace(module)


def test_guard_against_infinite_values_in_train_mode_leaves_no_trace() -> None:
    def guarded(module: Written, x: Tensor) -> Tensor:
        x = module.one(x)
        if module.training and (torch.isinf(x).any() or not x.isfinite().all()):
            x = x.clamp(-1e4, 1e4)
        return functional.relu(x)

    traced = trace_module(Written(guarded), ())
    assert isinstance(traced, Traced)
    assert [node.name for node in traced.gm.graph.nodes] == ["x", "one", "relu", "output"]


def test_condition_that_is_also_a_value_stays_in_the_graph() -> None:
    def counted(module: Written, x: Tensor) -> Any:
        long = x.shape[2] > 1
        return (module.one(x) if long else x), long

    module = Written(counted)
    tracer = FunctionalTracer()
    gm = fx.GraphModule(module, tracer.trace(module))
    gm.graph.lint()
    assert gm(torch.rand(1, 4, 3, 3))[1] is True
    steps = [step.name for step in tracer.call.steps if isinstance(step, fx.Node)]
    assert steps == [node.name for node in gm.graph.nodes]
