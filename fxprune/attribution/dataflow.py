"""What flows from island to island: found by autograd, which sees through the Python between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, fx, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_leaves

from fxprune.graph.records import IMAGES, RESULTS, Link


def trace_dataflow(
    run: Callable[[], Tensor], graphs: Sequence[tuple[str, fx.GraphModule]]
) -> tuple[Tensor, tuple[Link, ...]]:
    """Run a model once and see which islands take what others gave.

    Parameters
    ----------
    run : callable
        Runs the model with gradients, the captured graphs in it, and returns its loss.
    graphs
        Island names and graphs.

    Returns
    -------
    loss : Tensor
        What `run` returned.
    links : tuple of Link
        In the order in which they were met. What gradients do not follow (boxes that are detached) is no link.
    """
    given: dict[Node, str] = {}
    links: dict[Link, None] = {}

    def take(values: Any, target: str) -> None:
        for source in _source_islands(values, given) or ([IMAGES] if target != RESULTS else []):
            links[Link(source, target)] = None

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            take((args, kwargs), name)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            given.update(dict.fromkeys(_gradient_nodes(output), name))

        return before, after

    with ExitStack() as stack:
        for name, gm in graphs:
            before, after = hooks(name)
            for handle in (
                gm.register_forward_pre_hook(before, with_kwargs=True),
                gm.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
        loss = run()
    take(loss, RESULTS)
    return loss, tuple(links)


def _gradient_nodes(values: Any) -> Iterator[Node]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            yield get_gradient_edge(leaf).node


def _source_islands(values: Any, given: dict[Node, str]) -> list[str]:
    """Islands whose values these were computed from, with no other island between."""
    found: dict[str, None] = {}
    waiting, seen = list(_gradient_nodes(values)), set[Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in given:
            found[given[node]] = None
        else:
            waiting += [further for further, _ in node.next_functions if further is not None]
    return list(found)
