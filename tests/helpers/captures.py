"""A model's captured graphs and regions, for tests and benchmarks that look at parts of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.capture.islands import capture_islands
from fxprune.graph.records import Island
from fxprune.runtime.private_copy import private_copy


def capture_copy(model: nn.Module, batch: Any, whole_model_is_graph: bool) -> tuple[nn.Module, list[Island]]:
    """Copy a model and capture the copy's graphs, as they are called at inference."""
    twin = private_copy(model).eval()
    islands, _ = capture_islands(twin, [lambda network: network.eval()(batch)], whole_model_is_graph)
    return twin, islands
