"""Extracts regions from a captured model as single modules with their inputs, to compile and time each one alone.

A region that is called alone also pays for the call, its guards, and the conversion of its inputs to its memory layout.
Within the model it does not. So a single region and a chain of several copies are timed, each copy with its own
weights. The additional time of the chain, per additional copy, is the time of the region.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.fx_utils import get_attribute, graph_structure, is_constant_node
from fxprune.graph.interpreters import Graphs, NodeName, run_with
from fxprune.graph.records import Region
from fxprune.graph.symbolic_shapes import tensor_specs


@dataclass(frozen=True, eq=False)
class RegionModule:
    """A region as a separate module.

    Attributes
    ----------
    region : str
        Name of the region.
    module : GraphModule
        Its inputs are the values that the region reads from outside. Its output is the exit value.
    stand_in : int
        Position of the stand-in among the inputs.
    calls : tuple of tuple
        Inputs of each call, one tuple per time that the model runs the region.
    """

    region: str
    module: fx.GraphModule
    stand_in: int
    calls: tuple[tuple[Any, ...], ...]

    @cached_property
    def work_key(self) -> str:
        """Key that is equal for regions with the same work: equal layers on values of equal size."""
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
        """Make a module that runs the region `times` times in a row; also return its inputs.

        Each copy has its own weights. It reads the output of the previous copy instead of the stand-in.
        """
        parts = [self.module, *(copy.deepcopy(self.module) for _ in range(times - 1))]
        root, graph, inputs, results = nn.ModuleList(parts), fx.Graph(), list[Any](), list[fx.Node]()
        for call in self.calls:
            result = None
            for number, part in enumerate(parts):
                values: list[fx.Node] = []
                for position, value in enumerate(call):
                    if result is not None and position == self.stand_in:
                        values.append(result)
                        continue
                    values.append(graph.placeholder(f"value{len(inputs)}"))
                    inputs.append(value.clone() if isinstance(value, torch.Tensor) else value)
                result = _inline(graph, part, str(number), values)
            assert result is not None
            results.append(result)
        graph.output(tuple(results))
        return fx.GraphModule(root, graph), inputs


def extract_regions(run: Callable[[], Any], graphs: Graphs, regions: Iterable[Region]) -> list[RegionModule]:
    """Extract regions from a captured model, and run the model once to record their inputs.

    Parameters
    ----------
    run : callable
        Runs the model.
    graphs : Graphs
        The graphs of the model's islands.
    regions : iterable of Region
        Regions to extract.

    Returns
    -------
    list of RegionModule
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
    """Copy a region's nodes into a new graph; return its module and the names of its input nodes."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inside = [node for node in gm.graph.nodes if node.name in region.nodes]
    sources = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in inside)
    inputs = [source for source in sources if not is_constant_node(source)]
    copies |= {source: graph.placeholder(source.name) for source in inputs}
    for node in [*_constants_before(sources, gm.graph), *inside]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(next(copies[node] for node in inside if node.name == region.exit))
    return fx.GraphModule(gm, graph), [source.name for source in inputs]


def _constants_before(sources: Iterable[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """Return those of the sources that are constants, and the constants they are computed from, in graph order."""
    waiting, found = [source for source in sources if is_constant_node(source)], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        found.add(node)
        waiting += node.all_input_nodes
    return [node for node in graph.nodes if node in found]


def _inline(graph: fx.Graph, part: fx.GraphModule, prefix: str, values: Sequence[fx.Node]) -> fx.Node:
    """Append the nodes of a part to a graph and return its output node."""
    taken = (node for node in part.graph.nodes if node.op == "placeholder")
    copies: dict[fx.Node, fx.Node] = dict(zip(taken, values, strict=True))
    for node in part.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copies[node].target = f"{prefix}.{node.target}"
    return copies[part.graph.output_node().all_input_nodes[0]]


class _InputRecorder(fx.Interpreter):
    """Records the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, island: str, values: dict[NodeName, list[Any]]) -> None:
        super().__init__(gm)
        self.island, self.values = island, values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if (self.island, n.name) in self.values:
            self.values[self.island, n.name].append(value)
        return value
