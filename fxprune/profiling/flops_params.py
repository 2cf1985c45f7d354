"""Counts the FLOPs of a model and of each node while the model runs, and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxprune.graph.fx_utils import join_path, node_parameters
from fxprune.graph.interpreters import Graphs, NodeName, run_with


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the same nodes read. They are removed if all these nodes are removed.

    Attributes
    ----------
    params : int
        Number of values in the parameters.
    readers : tuple of NodeName
        Every node that reads them. A layer that is called five times has five readers.
    """

    params: int
    readers: tuple[NodeName, ...]


def count_flops(run: Callable[[], Any], graphs: Graphs) -> tuple[int, dict[NodeName, int]]:
    """Run a model once and count its floating point operations: two per multiply-add, as in torch.

    Parameters
    ----------
    run : callable
        Runs the model.
    graphs : Graphs
        The graphs of the model's islands.

    Returns
    -------
    total : int
        FLOPs of the whole run, including operations outside the graphs.
    nodes : dict
        FLOPs of each node, summed over all its calls.

    Examples
    --------
    >>> gm = fx.symbolic_trace(nn.Linear(2, 3))
    >>> count_flops(lambda: gm(torch.ones(1, 2)), Graphs(gm, (("", gm),)))[0]
    12
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
    """Switch off the fused inference kernel of attention, because torch's counter does not know its operations."""
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


def group_parameters(
    model: nn.Module, graphs: Iterable[tuple[str, fx.GraphModule]], units: Iterable[tuple[Collection[str], int]] = ()
) -> list[ParameterGroup]:
    """Group a model's parameters by the nodes that read them.

    A parameter that a second module holds, and that is read there outside the captured graphs, is in no group: it is
    never removed. `units` are paths of parameters that are removed together, with the number of values that do not
    count.

    Examples
    --------
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3)))
    >>> group_parameters(gm, [("", gm)])
    [ParameterGroup(params=9, readers=(('', '_0'),))]
    """
    readers: dict[int, dict[NodeName, None]] = {}
    read: dict[int, set[tuple[int, str]]] = {}
    sizes: dict[int, int] = {}
    names: dict[int, set[str]] = {}
    for island, gm in graphs:
        for node in gm.graph.nodes:
            for path, parameter in node_parameters(gm, node):
                owner, _, name = join_path(island, path).rpartition(".")
                readers.setdefault(id(parameter), {})[island, node.name] = None
                read.setdefault(id(parameter), set()).add((id(model.get_submodule(owner)), name))
                sizes[id(parameter)] = parameter.numel()
                names.setdefault(id(parameter), set()).add(join_path(island, path))
    everywhere: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():  # a module with several paths comes once
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            everywhere.setdefault(id(parameter), set()).add((id(module), name))
    removable = [key for key in readers if everywhere.get(key, set()) <= read[key]]
    for paths, uncounted in units:
        first, *others = [key for key in removable if names[key].issubset(paths)] or [0]
        for key in others:
            readers[first] |= readers[key]
            sizes[first] += sizes[key]
            removable.remove(key)
        sizes[first] = sizes.get(first, 0) - uncounted
    groups: dict[tuple[NodeName, ...], int] = {}
    for key, nodes in readers.items():
        if key in removable:
            groups[tuple(nodes)] = groups.get(tuple(nodes), 0) + sizes[key]
    return [ParameterGroup(params, nodes) for nodes, params in groups.items()]


def count_params(model: nn.Module) -> int:
    """Count the values in all parameters of a model; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())
