"""Regions by themselves: cut out of a captured model with the values they are fed, to be compiled and timed alone.

A region that is called alone pays for the call, its guards, and for bringing its values into the layout it works in;
within the model it does not. So it is timed once and several times in a row, each on weights of its own: what they take
more, shared out among them, is what one of it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.fx_utils import get_attribute, graph_structure
from fxprune.graph.interpreters import Graphs, NodeName, run_with
from fxprune.graph.records import Region
from fxprune.graph.symbolic_shapes import tensor_specs


@dataclass(frozen=True, eq=False)
class RegionModule:
    """A region as a module of its own.

    Attributes
    ----------
    region : str
        Its name.
    module : GraphModule
        Takes the values that the region reads from outside, and gives its exit's.
    stand_in : int
        Position among them of the value that stands in for the exit.
    calls : tuple of tuple
        What it was given, once for every time the model runs it.
    """

    region: str
    module: fx.GraphModule
    stand_in: int
    calls: tuple[tuple[Any, ...], ...]

    @cached_property
    def work_key(self) -> str:
        """The same for regions that do the same work: equal layers on equally sized values."""
        rows = []
        for node, (_, target, *arguments) in zip(
            self.module.graph.nodes, graph_structure(self.module.graph), strict=True
        ):
            if node.op == "call_module":
                target = repr(self.module.get_submodule(target))
            elif node.op == "get_attr":
                target = repr(tensor_specs(get_attribute(self.module, target)))
            rows.append((node.op, "" if node.op == "placeholder" else target, *arguments))
        return repr((rows, tensor_specs(self.calls), self.stand_in))

    def chained(self, times: int) -> tuple[fx.GraphModule, list[Any]]:
        """Make a module that does the region's work so many times, and what it takes.

        Each reads what the one before it gave in place of what stands in for the region, and has weights of its own.
        """
        parts = [self.module, *(copy.deepcopy(self.module) for _ in range(times - 1))]
        root, graph, given, results = nn.ModuleList(parts), fx.Graph(), list[Any](), list[fx.Node]()
        for call in self.calls:
            result = None
            for number, part in enumerate(parts):
                values: list[fx.Node] = []
                for position, value in enumerate(call):
                    if result is not None and position == self.stand_in:
                        values.append(result)
                        continue
                    values.append(graph.placeholder(f"value{len(given)}"))
                    given.append(value.clone() if isinstance(value, torch.Tensor) else value)
                result = _inline(graph, part, str(number), values)
            assert result is not None
            results.append(result)
        graph.output(tuple(results))
        return fx.GraphModule(root, graph), given


def extract_regions(run: Callable[[], Any], graphs: Graphs, regions: Iterable[Region]) -> list[RegionModule]:
    """Cut regions out of a captured model, and run it once to see what they are fed.

    Parameters
    ----------
    run : callable
        Runs the model, the captured graphs in it.
    graphs
        Island names and graphs.
    regions : iterable of Region
        Which ones.

    Returns
    -------
    list of Piece
        In the order of the regions.

    Examples
    --------
    >>> pieces = extract_regions(lambda: model(images), graphs, regions)   # doctest: +SKIP
    >>> module, values = pieces[0].chained(2)                     # doctest: +SKIP
    """
    known = dict(graphs)
    cut = [(region, *extract_subgraph(known[region.island], region)) for region in regions]
    values: dict[NodeName, list[Any]] = {(region.island, name): [] for region, _, inputs in cut for name in inputs}
    with run_with(graphs, lambda island, gm: _InputRecorder(gm, island, values)):
        run()
    return [
        RegionModule(
            region=region.name,
            module=module,
            stand_in=inputs.index(region.stand_in),
            calls=tuple(zip(*(values[region.island, name] for name in inputs), strict=True)),
        )
        for region, module, inputs in cut
    ]


def extract_subgraph(gm: fx.GraphModule, region: Region) -> tuple[fx.GraphModule, list[str]]:
    """Copy a region's nodes into a graph of their own; returns its module and the names of the nodes that feed it."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inside = [node for node in gm.graph.nodes if node.name in region.nodes]
    sources = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in inside)
    inputs = [source for source in sources if source.op != "get_attr"]
    copies |= {source: graph.placeholder(source.name) for source in inputs}
    for node in [*(source for source in sources if source.op == "get_attr"), *inside]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(next(copies[node] for node in inside if node.name == region.exit))
    return fx.GraphModule(gm, graph), [source.name for source in inputs]


def _inline(graph: fx.Graph, part: fx.GraphModule, prefix: str, values: Sequence[fx.Node]) -> fx.Node:
    """Append a part's nodes to a graph and return its result."""
    taken = (node for node in part.graph.nodes if node.op == "placeholder")
    copies: dict[fx.Node, fx.Node] = dict(zip(taken, values, strict=True))
    for node in part.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copies[node].target = f"{prefix}.{node.target}"
    return copies[part.graph.output_node().all_input_nodes[0]]


class _InputRecorder(fx.Interpreter):
    """Notes the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, island: str, values: dict[NodeName, list[Any]]) -> None:
        super().__init__(gm)
        self.island, self.values = island, values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if (self.island, n.name) in self.values:
            self.values[self.island, n.name].append(value)
        return value
