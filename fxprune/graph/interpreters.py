"""Runs captured graphs by fx interpreters, node by node, inside a model that is not changed for this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
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
        gradients = torch.is_grad_enabled() or (_keep_gradients.get() and not torch.is_inference_mode_enabled())
        with torch.set_grad_enabled(gradients):
            return interpreter.run(*bind_placeholders(gm, args, kwargs))

    return forward


_keep_gradients: ContextVar[bool] = ContextVar("keep_gradients", default=False)


@contextmanager
def gradients_in_graphs() -> Iterator[None]:
    """Run graphs with gradients in the block, also those that the model calls under `torch.no_grad`.

    The loss changes with the outputs of a frozen backbone as with those of any other, and its blocks have scores.

    Examples
    --------
    >>> with run_with(graphs, make), gradients_in_graphs():        # doctest: +SKIP
    ...     loss(model, batch).backward()
    """
    token = _keep_gradients.set(True)
    try:
        yield
    finally:
        _keep_gradients.reset(token)


NodeName = tuple[str, str]
"""Path of the island and name of the node. Together they identify a node in the whole model."""
