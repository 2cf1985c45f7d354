"""Run captured graphs node by node inside a model that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fxprune.shapes import bind


@contextmanager
def interpreted(
    graphs: Iterable[tuple[str, fx.GraphModule]], make: Callable[[str, fx.GraphModule], fx.Interpreter]
) -> Iterator[None]:
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
            gm.__dict__["forward"] = _forward(gm, make(name, gm))
            changed.append(gm)
        yield
    finally:
        for gm in changed:
            del gm.__dict__["forward"]


def _forward(gm: fx.GraphModule, interpreter: fx.Interpreter) -> Callable[..., Any]:
    interpreter.extra_traceback = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        return interpreter.run(*bind(gm, args, kwargs))

    return forward


NodeName = tuple[str, str]
"""An island's path and a node's name: what names a node in the whole model."""


def record_sizes(run: Callable[[], Any], graphs: Sequence[tuple[str, fx.GraphModule]]) -> dict[NodeName, list[Any]]:
    """Run a model once and return the shapes that each node's value had, one a call; only single tensors."""
    sizes: dict[NodeName, list[Any]] = {}

    def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
        return _SizeInterpreter(gm, island, sizes)

    with interpreted(graphs, make), torch.no_grad():
        run()
    return sizes


class _SizeInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, island: str, sizes: dict[NodeName, list[Any]]) -> None:
        super().__init__(gm)
        self.island, self.sizes = island, sizes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.sizes.setdefault((self.island, n.name), []).append(tuple(value.shape))
        return value
