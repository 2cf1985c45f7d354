"""The six systems under torch.compile: by the backend, and pruned beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxprune
from benchmarks.systems import SIX, Sizes, System
from fxprune.backend import fxprune_backend

SMALL = Sizes(classifier_px=64, classifier_images=2, detector_px=128, detector_images=1)

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("system", SIX, ids=lambda system: system.name)]


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(system: System) -> tuple[nn.Module, Any, Any]:
    """Model, calibration batch, and what the model takes at inference."""
    model, batch = system.build(SMALL)
    return model, batch, batch["img"] if isinstance(batch, dict) else batch[0]


def assert_same(found: Any, expected: Any) -> None:
    tensors = [[leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for value in (found, expected)]
    assert len(tensors[0]) == len(tensors[1]) > 0
    for first, second in zip(*tensors, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_backend_gives_what_apply_gives(system: System) -> None:
    model, batch, x = make(system)
    plan = fxprune.analyze(model, [batch], criterion="l1").plan(0.1)
    compiled = torch.compile(model, backend=fxprune_backend, options={"plan": plan, "inner": "eager"})  # type: ignore[dict-item]
    expected = fxprune.apply(model, plan).eval()(x)
    for _ in range(2):  # at the second call, regions that were not met are complained of
        assert_same(compiled(x), expected)


def graphs_of(model: nn.Module, x: Any) -> int:
    """How many graphs Dynamo makes of a call."""
    torch._dynamo.reset()
    graphs = 0

    def count(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm

    torch.compile(model, backend=count)(x)
    return graphs


@torch.no_grad()
def test_pruning_adds_no_graph_break(system: System) -> None:
    model, batch, x = make(system)
    pruned = fxprune.compile(model, [batch], 0.1, criterion="l1").eval()
    assert graphs_of(pruned, x) <= graphs_of(model, x)
