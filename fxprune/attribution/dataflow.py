"""Finds the data flow between islands in the autograd graph, which also records the Python code between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from fxprune.graph.interpreters import Graphs
from fxprune.graph.records import IMAGES, RESULTS, Link
from fxprune.runtime.torch_internals import tree_leaves


def trace_dataflow(run: Callable[[], Tensor], graphs: Graphs) -> tuple[Tensor, tuple[Link, ...]]:
    """Run a model once and find which islands read the outputs of which others.

    Parameters
    ----------
    run : callable
        ``() -> Tensor``: runs the model with gradients, and returns its loss.
    graphs : Graphs
        The graphs of the model's islands.

    Returns
    -------
    loss : Tensor
        Output of `run`.
    links : tuple of Link
        In the order of the calls. Gradients do not follow detached values, such as proposed boxes: these make no link.
    """
    owners: dict[Node, str] = {}
    links: dict[Link, None] = {}

    def add_links(values: Any, target: str) -> None:
        for source in _source_islands(values, owners) or ([IMAGES] if target != RESULTS else []):
            links[Link(source, target)] = None

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            add_links((args, kwargs), name)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            owners.update(dict.fromkeys(_gradient_nodes(output), name))

        return before, after

    with ExitStack() as stack:
        for name, _ in graphs:
            before, after = hooks(name)
            module = graphs.model.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
        loss = run()
    add_links(loss, RESULTS)
    return loss, tuple(links)


def _gradient_nodes(values: Any) -> Iterator[Node]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            yield get_gradient_edge(leaf).node


def _source_islands(values: Any, owners: dict[Node, str]) -> list[str]:
    """Return the islands from whose outputs the values were computed, with no other island between."""
    islands: dict[str, None] = {}
    waiting, seen = list(_gradient_nodes(values)), set[Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in owners:
            islands[owners[node]] = None
        else:
            waiting += [further for further, _ in node.next_functions if further is not None]
    return list(islands)
