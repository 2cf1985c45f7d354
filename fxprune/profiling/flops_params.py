"""What a model and each of its nodes cost: FLOPs, counted while it runs, and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune.graph.fx_utils import join_path, node_parameters
from fxprune.graph.interpreters import NodeName, run_with


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the same nodes read; they go when all of these go.

    Attributes
    ----------
    params : int
        Number of values.
    readers : tuple of NodeName
        Every node that reads them; a layer called five times has five.
    """

    params: int
    readers: tuple[NodeName, ...]


def count_flops(
    run: Callable[[], Any], graphs: Sequence[tuple[str, fx.GraphModule]]
) -> tuple[int, dict[NodeName, int]]:
    """Run a model once and count floating point operations, two per multiply-add as torch counts.

    Parameters
    ----------
    run : callable
        Runs the model, the captured graphs in it.
    graphs
        Island names and graphs.

    Returns
    -------
    total : int
        Of the whole run, what lies outside the graphs included.
    nodes : dict
        Of each node, summed over all its calls.
    """
    nodes: dict[NodeName, int] = {}
    with _unfused_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():

        def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
            return _CountingInterpreter(gm, island, counter, nodes)

        with run_with(graphs, make):
            run()
    return int(counter.get_total_flops()), nodes


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Switch off attention's fused inference kernel, whose operations torch's counter does not know."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _CountingInterpreter(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, island: str, counter: FlopCounterMode, nodes: dict[NodeName, int]) -> None:
        super().__init__(gm)
        self.island, self.counter, self.nodes = island, counter, nodes

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        key = (self.island, n.name)
        self.nodes[key] = self.nodes.get(key, 0) + int(self.counter.get_total_flops() - before)
        return value


def group_parameters(model: nn.Module, graphs: Iterable[tuple[str, fx.GraphModule]]) -> list[ParameterGroup]:
    """Group a model's parameters by the nodes that read them.

    A parameter that is also reachable from outside the captured graphs, under a second name, is in no group: it stays
    whatever goes.
    """
    readers: dict[int, dict[NodeName, None]] = {}
    names: dict[int, set[str]] = {}
    sizes: dict[int, int] = {}
    for island, gm in graphs:
        for node in gm.graph.nodes:
            for path, parameter in node_parameters(gm, node):
                readers.setdefault(id(parameter), {})[island, node.name] = None
                names.setdefault(id(parameter), set()).add(join_path(island, path))
                sizes[id(parameter)] = parameter.numel()
    everywhere: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        everywhere.setdefault(id(parameter), set()).add(name)
    groups: dict[tuple[NodeName, ...], int] = {}
    for key, nodes in readers.items():
        if everywhere.get(key, set()) <= names[key]:
            groups[tuple(nodes)] = groups.get(tuple(nodes), 0) + sizes[key]
    return [ParameterGroup(params, nodes) for nodes, params in groups.items()]


def count_params(model: nn.Module) -> int:
    """Number of values in all parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
