"""A model's captured graphs and regions, for tests and benchmarks that look at parts of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from fxprune.graph.capture import capture_islands
from fxprune.graph.records import Island, Region
from fxprune.planning.plan import Candidate
from fxprune.runtime.private_copy import private_copy


def capture_copy(model: nn.Module, batch: Any, whole_model_is_graph: bool) -> tuple[nn.Module, list[Island]]:
    """Capture the graphs of a copy of a model, as they are called at inference."""
    run = lambda network: network.eval()(batch)  # noqa: E731
    captured, islands, _ = capture_islands(private_copy(model).eval(), run, whole_model_is_graph)
    return captured, islands


def to_regions(candidates: Iterable[Candidate]) -> list[Region]:
    """Turn a plan's candidates back into regions."""
    names = [field.name for field in fields(Region)]
    return [Region(**{name: getattr(candidate, name) for name in names}) for candidate in candidates]
