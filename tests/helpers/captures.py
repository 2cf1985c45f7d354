"""A model's captured graphs and regions, for tests and benchmarks that look at parts of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.graph.capture import capture_islands
from fxprune.graph.records import Island
from fxprune.runtime.private_copy import private_copy


def capture_copy(model: nn.Module, batch: Any, whole_model_is_graph: bool) -> tuple[nn.Module, list[Island]]:
    """Capture the graphs of a copy of a model, as they are called at inference."""
    run = lambda network: network.eval()(batch)  # noqa: E731
    captured, islands, _ = capture_islands(private_copy(model).eval(), run, whole_model_is_graph)
    return captured, islands
