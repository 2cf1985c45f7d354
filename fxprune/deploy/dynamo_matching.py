"""Finds the regions of a plan in the graphs that Dynamo passes to a backend.

Dynamo's graphs contain no modules, and their nodes have other names than those of the captured graphs. But both come
from the same program, and Dynamo records for each node in which module call it was created. The k-th ``add`` in the
forward of a module is therefore the k-th ``add`` of this module in Dynamo's graph too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import PlanError
from fxprune.graph.fx_utils import constant_sources, get_attribute, join_path
from fxprune.graph.operators import INPLACE_TO_FUNCTIONAL
from fxprune.planning.plan import Candidate
from fxprune.runtime.torch_internals import CompiledFrame, example_value, is_weight_input, module_calls, tree_leaves

_SCALAR_METHODS = frozenset({"size", "dim", "numel", "stride", "type", "get_device", "is_floating_point", "ndimension"})
_SCALAR_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "training", "layout"})


@dataclass(frozen=True)
class ProgramPoint:
    """An operation of the program.

    Attributes
    ----------
    owner : str
        Path of the module whose forward contains the operation.
    operation : str
        Name of the operation; "" is the whole call of `owner`.
    """

    owner: str
    operation: str


@dataclass(frozen=True)
class Occurrence:
    """One of the values that a program point computes while the program runs an island once.

    Attributes
    ----------
    point : ProgramPoint
        What computes the value.
    index : int
        Position of the value, from 0.
    total : int
        Number of values that the point computes in one run of the island.
    """

    point: ProgramPoint
    index: int
    total: int


def find_occurrences(island: str, gm: fx.GraphModule) -> dict[str, Occurrence]:
    """Find the occurrence of each node of a captured graph.

    Parameters
    ----------
    island : str
        Path of the island in the model.
    gm : GraphModule
        Its captured graph.

    Returns
    -------
    dict of str to Occurrence
        By node name. Inputs, constants, the output and nodes that compute sizes are left out.

    Examples
    --------
    >>> find_occurrences("", fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    {'_0': Occurrence(point=ProgramPoint(owner='0', operation=''), index=0, total=1)}
    """
    points: dict[str, ProgramPoint] = {}
    scalars: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" and not isinstance(get_attribute(gm, str(node.target)), torch.Tensor):
            scalars.add(node)  # the mode of a module, a constant in Dynamo's graphs
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if _is_scalar(node, scalars):
            scalars.add(node)
        elif node.op == "call_module":
            points[node.name] = ProgramPoint(join_path(island, str(node.target)), "")
        else:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            points[node.name] = ProgramPoint(join_path(island, stack[-1][0] if stack else ""), operation_kind(node))
    totals, seen = Counter(points.values()), Counter[ProgramPoint]()
    occurrences = {}
    for name, point in points.items():
        occurrences[name] = Occurrence(point, seen[point], totals[point])
        seen[point] += 1
    return occurrences


def operation_kind(node: fx.Node) -> str:
    """Return the name of a node's operation. It is the same for the function, the method and the in-place form."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    target = INPLACE_TO_FUNCTIONAL.get(node.target, node.target)
    return str(getattr(target, "__name__", target)).rstrip("_")


def _is_scalar(node: fx.Node, scalars: set[fx.Node]) -> bool:
    """Whether a node computes a size or the like. In Dynamo's graphs these are constants or symbols."""
    if node.op == "call_method" and node.target in _SCALAR_METHODS:
        return True
    if node.target is getattr and node.args[1] in _SCALAR_ATTRIBUTES:
        return True
    sources = node.all_input_nodes
    return node.op == "call_function" and bool(sources) and all(source in scalars for source in sources)


@dataclass(frozen=True)
class Bypass:
    """A region in one of Dynamo's graphs.

    Attributes
    ----------
    exit : str
        Node whose value is replaced.
    stand_in : str
        Node whose value replaces it.
    nodes : tuple of str
        All nodes of the region.
    contiguous : bool
        Whether the stand-in is made contiguous.
    """

    exit: str
    stand_in: str
    nodes: tuple[str, ...]
    contiguous: bool


class DynamoGraph:
    """One of Dynamo's graphs, with its nodes sorted by program point.

    Parameters
    ----------
    gm : GraphModule
        The graph that a backend gets.
    model : Module
        The whole model.
    frame : CompiledFrame, optional
        The Python frame from which Dynamo made the graph. Without it, operations outside of module calls count as
        operations of the whole model.

    Attributes
    ----------
    values : list of Node
        The nodes that compute tensors, in graph order.
    calls : dict
        Nodes by program point and by call. A call of a whole module has several nodes, an operation one.
    submodules : list of str
        Variables of the frame that are modules of the model. The graph holds for these objects only.
    """

    def __init__(self, gm: fx.GraphModule, model: nn.Module, frame: CompiledFrame | None = None) -> None:
        paths = {id(module): path for path, module in model.named_modules()}
        self.gm = gm
        self.values = [node for node in gm.graph.nodes if node.op.startswith("call_") and _is_tensor(node)]
        self.calls: dict[ProgramPoint, dict[Any, list[fx.Node]]] = {}
        for node in self.values:
            owner = "" if frame is None else paths.get(id(frame.module))
            for call in module_calls(node):
                owner = call.path if call.module_id is None else paths.get(call.module_id)
                self._add(owner, "", call.key, node)
            self._add(owner, operation_kind(node), node, node)
        variables = {} if frame is None else frame.variables
        self.submodules = [name for name, value in variables.items() if paths.get(id(value))]

    def _add(self, owner: str | None, operation: str, call: Any, node: fx.Node) -> None:
        """Sort a node into `calls`; `owner` is None if it is not of the model."""
        if owner is not None:
            self.calls.setdefault(ProgramPoint(owner, operation), {}).setdefault(call, []).append(node)

    def find_region(self, region: Candidate, places: Mapping[str, Occurrence]) -> list[Bypass]:
        """Find a region.

        Parameters
        ----------
        region : Candidate
            A region of the plan.
        places : mapping of str to Occurrence
            Occurrences of the nodes of its island.

        Returns
        -------
        list of Bypass
            One for each run of the island in this graph; empty if the graph contains no node of the region.

        Raises
        ------
        PlanError
            If the graph contains only a part of the region, or nodes outside of the region read values from its
            inside.
        """
        wanted = [places[name] for name in region.nodes if name in places]
        found = {place: list(self.calls.get(place.point, {}).values()) for place in wanted}
        runs = {len(calls) / place.total for place, calls in found.items() if calls}
        if not runs:
            return []
        missing = [place.point for place, calls in found.items() if not calls and place.point.operation]
        if len(runs) > 1 or missing or runs != {int(max(runs))}:
            raise PlanError(
                f"only a part of region {region.name!r} is in one of Dynamo's graphs"
                f"{f' ({missing[0].operation} of {missing[0].owner!r} is not)' if missing else ''}: a graph break cuts"
                " it; remove the break (TORCH_LOGS=graph_breaks shows it), or prune with fxprune.apply and compile that"
            )
        bypasses = []
        for run in range(int(max(runs))):
            members = [calls[run * place.total + place.index] for place, calls in found.items() if calls]
            within = {node for nodes in members for node in nodes}
            inside = [node for node in self.values if node in within]
            bypasses.append(self._make_bypass(region, inside, self._values_at(places.get(region.stand_in), run)))
        return bypasses

    def _values_at(self, place: Occurrence | None, run: int) -> set[fx.Node]:
        """Return the nodes of an occurrence in one run of the island; none if it is an input or not in this graph."""
        calls = list(self.calls.get(place.point, {}).values()) if place is not None else []
        index = run * place.total + place.index if place is not None else 0
        return set(calls[index]) if index < len(calls) else set()

    def _make_bypass(self, region: Candidate, inside: Sequence[fx.Node], stand_ins: set[fx.Node]) -> Bypass:
        within = set(inside)
        exits = [node for node in inside if any(user not in within for user in _readers(node))]
        if len(exits) != 1:
            raise PlanError(
                f"region {region.name!r} is not closed in Dynamo's graph: {[node.name for node in exits]} are read"
                " outside of it; prune with fxprune.apply and compile that"
            )
        (exit_,) = exits
        readers = [exit_] if region.kind == "drop" else inside
        entries = dict.fromkeys(
            source for node in readers for source in node.all_input_nodes if source not in within and _is_data(source)
        )
        alike = [source for source in entries if _shape_and_dtype(source) == _shape_and_dtype(exit_)]
        if len(alike) > 1:
            alike = [source for source in alike if source in stand_ins]
        if len(alike) != 1:
            raise PlanError(
                f"region {region.name!r}: {[source.name for source in entries]} feed it in Dynamo's graph, not one"
                " value of its exit's shape; prune with fxprune.apply and compile that"
            )
        return Bypass(exit_.name, alike[0].name, tuple(node.name for node in inside), region.contiguous)


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """Return the nodes that read a node's value, without nodes whose own value is never read (unused sizes)."""
    return [user for user in node.users if user.users or user.op == "output"]


def _is_tensor(node: fx.Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(example_value(node)))


def _is_data(node: fx.Node) -> bool:
    """Whether a node's value depends on the input images: it is a tensor and no weight."""
    return _is_tensor(node) and constant_sources(node, _is_weight) is None


def _is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" or is_weight_input(node)


def _shape_and_dtype(node: fx.Node) -> tuple[Any, ...]:
    value = example_value(node)
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, torch.Tensor) else (len(value),)


@dataclass
class RegionMatches:
    """Searches Dynamo's graphs of one model for the regions of a plan, and records which were found.

    Attributes
    ----------
    removed : sequence of Candidate
        The regions to remove.
    occurrences : mapping of str to mapping
        By island, the occurrences of its nodes.
    matched : set of str
        Names of the regions that were found in a graph.
    model_found : bool
        Whether any graph contained an operation of the model.
    """

    removed: Sequence[Candidate]
    occurrences: Mapping[str, Mapping[str, Occurrence]]
    matched: set[str] = field(default_factory=set)
    model_found: bool = False

    @property
    def unmatched(self) -> list[str]:
        """Names of the regions that were found in no graph."""
        return [region.name for region in self.removed if region.name not in self.matched]

    def forget(self) -> None:
        """Start again: no graph was searched."""
        self.matched.clear()
        self.model_found = False

    def find_bypasses(self, graph: DynamoGraph) -> list[Bypass]:
        """Find the regions of the plan in one graph and add them to `matched`.

        Raises
        ------
        PlanError
            As `DynamoGraph.find_region`.
        """
        self.model_found |= bool(graph.calls)
        bypasses = []
        for region in self.removed:
            found = graph.find_region(region, self.occurrences[region.island])
            if found:
                self.matched.add(region.name)
                bypasses += found
        return bypasses
