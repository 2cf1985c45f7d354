"""Ctrl-C is raised as KeyboardInterrupt, also where torch would turn it into another error."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.capture.tracer import FunctionalTracer
from fxprune.graph.symbolic_shapes import propagate_symbolic, tensor_specs
from fxprune.runtime.signals import defer_interrupts

pytestmark = pytest.mark.usefixtures("interruptible")


def interrupted(x: Tensor) -> Tensor:
    """What torch does to a Ctrl-C in the midst of a fake tensor."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise TypeError("strange") from None
    return x


class Interrupted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return interrupted(x)


def test_defer_interrupts_raises_at_the_end_of_the_block() -> None:
    before, reached = signal.getsignal(signal.SIGINT), []

    @defer_interrupts()
    def block() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append(signal.getsignal(signal.SIGINT) is before)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_defer_interrupts_keeps_the_error_of_the_block() -> None:
    before = signal.getsignal(signal.SIGINT)

    @defer_interrupts()
    def block(interrupt: bool) -> None:
        if interrupt:
            signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block(interrupt=False)
    with pytest.raises(KeyboardInterrupt) as caught:
        block(interrupt=True)
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is before


def test_defer_interrupts_respects_ignored_interrupts() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen = []
    try:
        with defer_interrupts():
            signal.raise_signal(signal.SIGINT)
            seen.append(signal.getsignal(signal.SIGINT))
        seen.append(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN, signal.SIG_IGN]


def test_defer_interrupts_does_nothing_in_other_threads() -> None:
    def block() -> str:
        with defer_interrupts():
            return "done"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(block).result() == "done"


def test_interrupt_in_shape_propagation_is_raised() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(interrupted, (graph.placeholder("x"),)))
    with pytest.raises(KeyboardInterrupt):
        propagate_symbolic(fx.GraphModule(nn.Module(), graph), tensor_specs((torch.zeros(2, 3, 4, 4),)), {})


def test_interrupt_in_tracing_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt):
        FunctionalTracer().trace(Interrupted())
    assert len(FunctionalTracer().trace(nn.Sequential(nn.ReLU())).nodes) == 3
