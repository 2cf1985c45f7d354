"""Run captured graphs node by node inside a model that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx

from fxprune.graph.symbolic_shapes import bind_placeholders

Graphs = Sequence[tuple[str, fx.GraphModule]]
"""Island names and graphs."""


@contextmanager
def run_with(graphs: Graphs, make: Callable[[str, fx.GraphModule], fx.Interpreter]) -> Iterator[None]:
    """Let interpreters run the given graphs until the end of the block.

    Parameters
    ----------
    graphs
        Island names and graphs; where the model calls a graph, its interpreter runs.
    make : callable
        ``(island, gm) -> Interpreter``.
    """
    changed: list[fx.GraphModule] = []
    try:
        for name, gm in graphs:
            gm.__dict__["forward"] = _make_forward(gm, make(name, gm))
            changed.append(gm)
        yield
    finally:
        for gm in changed:
            del gm.__dict__["forward"]


def _make_forward(gm: fx.GraphModule, interpreter: fx.Interpreter) -> Callable[..., Any]:
    interpreter.extra_traceback = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        return interpreter.run(*bind_placeholders(gm, args, kwargs))

    return forward


NodeName = tuple[str, str]
"""An island's path and a node's name: what names a node in the whole model."""
