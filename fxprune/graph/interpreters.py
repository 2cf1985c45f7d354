"""Runs captured graphs by fx interpreters, node by node, inside a model that is not changed for this."""

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
    """Run the given graphs by interpreters until the end of the block.

    Parameters
    ----------
    graphs
        Island names and graphs. When the model calls a graph, its interpreter runs.
    make : callable
        ``(island, gm) -> Interpreter``; called once per graph.

    Examples
    --------
    >>> with run_with(captured.graphs, lambda island, gm: fx.Interpreter(gm)):       # doctest: +SKIP
    ...     captured.model(images)
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
"""Path of the island and name of the node. Together they identify a node in the whole model."""
