"""Find a plan's regions again in Dynamo's graphs, which hold no modules but say of every node where it came from.

Both graphs run the same program, so the k-th ``add`` that a module's own code makes is the k-th ``add`` there too. A
node of a captured graph is therefore known by its `ProgramPoint`, and a region by the sites of its nodes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fxprune.errors import PlanError
from fxprune.graph.fx_utils import join_path
from fxprune.graph.tracer import INPLACE_TO_FUNCTIONAL
from fxprune.planning.plan import Candidate

_ROOT = re.compile(r"^L\['?\w+'?\]\.?")
_SCALAR_METHODS = frozenset({"size", "dim", "numel", "stride", "type", "get_device", "is_floating_point", "ndimension"})
_SCALAR_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "training", "layout"})
_MODULE_TENSOR = re.compile(r"_(parameters|buffers)_")


@dataclass(frozen=True)
class ProgramPoint:
    """Where a node's value is made: by the own code of module `owner` in an `operation`; "" is all the module does."""

    owner: str
    operation: str


@dataclass(frozen=True)
class Occurrence:
    """A site, which of its values in one run of the island (from 0), and how many there are in one run."""

    point: ProgramPoint
    index: int
    total: int


def find_occurrences(island: str, gm: fx.GraphModule) -> dict[str, Occurrence]:
    """Say of every node of a captured graph that computes a tensor where it stands in the model's program."""
    sites: dict[str, ProgramPoint] = {}
    scalars: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if _is_scalar(node, scalars):
            scalars.add(node)
        elif node.op == "call_module":
            sites[node.name] = ProgramPoint(join_path(island, str(node.target)), "")
        else:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            sites[node.name] = ProgramPoint(join_path(island, stack[-1][0] if stack else ""), operation_kind(node))
    totals, seen = Counter(sites.values()), Counter[ProgramPoint]()
    places = {}
    for name, site in sites.items():
        places[name] = Occurrence(site, seen[site], totals[site])
        seen[site] += 1
    return places


def operation_kind(node: fx.Node) -> str:
    """Name of what a node does, the same whether it is spelled as function, method or in place."""
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    target = INPLACE_TO_FUNCTIONAL.get(node.target, node.target)
    return str(getattr(target, "__name__", target)).rstrip("_")


def _is_scalar(node: fx.Node, scalars: set[fx.Node]) -> bool:
    """Whether a node yields sizes and the like; Dynamo folds these into constants or symbols."""
    if node.op == "call_method" and node.target in _SCALAR_METHODS:
        return True
    if node.target is getattr and node.args[1] in _SCALAR_ATTRIBUTES:
        return True
    sources = node.all_input_nodes
    return node.op == "call_function" and bool(sources) and all(source in scalars for source in sources)


@dataclass(frozen=True)
class Bypass:
    """A region in one of Dynamo's graphs: names of its exit, of what stands in for it, and of all its nodes."""

    exit: str
    stand_in: str
    nodes: tuple[str, ...]


class DynamoGraph:
    """One of Dynamo's graphs, its nodes sorted by where in the model they come from.

    Parameters
    ----------
    gm : GraphModule
        As a backend receives it.
    paths : mapping of int to str
        Path in the model of each of its modules, by `id`.
    """

    def __init__(self, gm: fx.GraphModule, paths: Mapping[int, str]) -> None:
        self.gm, self.paths = gm, paths
        self.values = [node for node in gm.graph.nodes if self._computes(node)]
        stacks = {node: self._stack(node) for node in self.values}
        prefix = next((prefix for _, prefix in stacks.values() if prefix is not None), "")
        self.calls: dict[ProgramPoint, dict[Any, list[fx.Node]]] = {}
        for node, (stack, _) in stacks.items():
            for call, path in stack:
                self.calls.setdefault(ProgramPoint(path, ""), {}).setdefault(call, []).append(node)
            own = ProgramPoint(stack[-1][1] if stack else prefix, operation_kind(node))
            self.calls.setdefault(own, {})[node] = [node]

    def _computes(self, node: fx.Node) -> bool:
        return node.op in ("call_function", "call_method", "call_module") and _is_tensor(node)

    def _stack(self, node: fx.Node) -> tuple[list[tuple[str, str]], str | None]:
        """Key and path in the model of every module call around a node; and the path of the frame's own module."""
        stack, prefix = [], None
        for key, (spelled, _) in (node.meta.get("nn_module_stack") or {}).items():
            relative = _ROOT.sub("", spelled)
            identity = str(key).partition("@")[0]
            path = self.paths.get(int(identity), relative) if identity.isdigit() else relative
            if prefix is None and path.endswith(relative):
                prefix = path[: len(path) - len(relative)].rstrip(".")
            stack.append((str(key), path))
        return stack, prefix

    def find_region(self, region: Candidate, places: Mapping[str, Occurrence]) -> list[Bypass]:
        """Find a region, once for every time the program runs its island; an empty list if no part of it is here.

        Raises
        ------
        PlanError
            If only a part of it is here, or it is not closed: a graph break cuts it, or something reads its inside.
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
                " it; remove the break (torch._dynamo.explain shows it), or prune with fxprune.apply and compile that"
            )
        pairs = []
        for run in range(int(max(runs))):
            members = [calls[run * place.total + place.index] for place, calls in found.items() if calls]
            within = {node for nodes in members for node in nodes}
            inside = [node for node in self.values if node in within]
            pairs.append(self._make_bypass(region, inside))
        return pairs

    def _make_bypass(self, region: Candidate, inside: Sequence[fx.Node]) -> Bypass:
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
        if len(alike) != 1:
            raise PlanError(
                f"region {region.name!r}: {[source.name for source in entries]} feed it in Dynamo's graph, not one"
                " value of its exit's shape; prune with fxprune.apply and compile that"
            )
        return Bypass(exit_.name, alike[0].name, tuple(node.name for node in inside))


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """Who reads a node's values; a size that is taken of them is no reader if nobody reads the size."""
    return [user for user in node.users if user.users or user.op == "output"]


def _is_tensor(node: fx.Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(node.meta.get("example_value")))


def _is_data(node: fx.Node) -> bool:
    """Whether a node's value flows through the network, other than a weight or a size."""
    if node.op == "get_attr" or not _is_tensor(node):
        return False
    return node.op != "placeholder" or _MODULE_TENSOR.search(str(node.target)) is None


def _shape_and_dtype(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["example_value"]
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, torch.Tensor) else (len(value),)


@dataclass
class RegionMatches:
    """The regions of a plan that are looked for in one compiled model.

    Attributes
    ----------
    removed : sequence of Candidate
        What is to go.
    occurrences : dict of str to dict
        By island, the place of every node.
    matched : set of str
        Names of the regions that were found so far.
    """

    removed: Sequence[Candidate]
    occurrences: Mapping[str, Mapping[str, Occurrence]]
    matched: set[str] = field(default_factory=set)

    @property
    def unmatched(self) -> list[str]:
        """Names of the regions that no graph had."""
        return [region.name for region in self.removed if region.name not in self.matched]

    def find_bypasses(self, graph: DynamoGraph) -> list[Bypass]:
        """All regions of the plan in one graph; notes which were met."""
        everything = []
        for region in self.removed:
            found = graph.find_region(region, self.occurrences[region.island])
            if found:
                self.matched.add(region.name)
                everything += found
        return everything
