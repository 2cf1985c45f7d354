"""Finds the places in the module tree where a region can be removed, smallest first."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxprune.capture.tracer import TRACED_CALL, TracedCall
from fxprune.graph.records import Region
from fxprune.rewriting.body_graph import nested_calls, nodes_below, nodes_in, received_values
from fxprune.rewriting.pruned_module import PassThrough
from fxprune.rewriting.whole_graph import IslandRewriter


@dataclass(frozen=True)
class Place:
    """A place where regions can be removed.

    Attributes
    ----------
    path : str
        Path, below the island, of the module whose forward becomes a graph. Not used if there are `identities`.
    inlined : {"none", "touched", "all"}
        Which of its children's forwards become part of the graph: none, those of which a part is removed, or all.
    identities : tuple of (str, Module or None)
        Path and new module of each part that is replaced instead, such as ``("layer3.1", Identity())``. None: the part
        is left out of the list that holds it.
    """

    path: str = ""
    inlined: str = "none"
    identities: tuple[tuple[str, nn.Module | None], ...] = ()


@dataclass(frozen=True)
class _Unit:
    """One call of a module, all of whose work is removed."""

    path: str
    call: int
    value: fx.Node
    replacement: tuple[Any, ...]  # arguments of PassThrough; () for an Identity


class PlaceFinder:
    """Finds the places of regions in one island.

    Parameters
    ----------
    root : Module
        The island's module.
    rewriter : IslandRewriter
        Knows the island's graph and its module calls.
    """

    def __init__(self, root: nn.Module, rewriter: IslandRewriter) -> None:
        self.root, self.rewriter = root, rewriter
        self.call: TracedCall = rewriter.traced.meta[TRACED_CALL]
        self.nodes = {node.name: node for node in rewriter.traced.graph.nodes}
        self.counts: Counter[str] = Counter()
        self.parents: dict[int, TracedCall] = {}
        for call in nested_calls(self.call):
            self.counts[call.path] += 1
            for step in call.steps:
                if isinstance(step, TracedCall):
                    self.parents[id(step)] = call
                elif step.op == "call_module":
                    self.counts[str(step.target)] += 1

    def find(self, regions: Sequence[Region]) -> list[list[Place]]:
        """Return the places of each region, smallest first. The last place of all regions is the whole island."""
        identities = self._find_identities(regions)
        found = []
        for index, region in enumerate(regions):
            found.append([*identities.get(index, []), *self._bodies(region)])
        return found

    def _bodies(self, region: Region) -> Iterator[Place]:
        """Yield the innermost module that computes the region's exit from its stand-in, then the modules around it."""
        inside = self._working(region.nodes)
        fitting = [call for call in nested_calls(self.call) if inside <= {node.name for node in nodes_below(call)}]
        fitting = [call for call in fitting if self._knows(call, region.stand_in)]
        call = min(reversed(fitting), key=lambda call: len(list(nodes_below(call))), default=self.call)
        seen = set()
        while True:
            if call.path not in seen:
                seen.add(call.path)
                yield from (Place(call.path, inlined) for inlined in ("none", "touched", "all"))
            if call is self.call:
                return
            call = self.parents[id(call)]

    def _knows(self, call: TracedCall, value: str) -> bool:
        return value in received_values(call) or any(node.name == value for node in nodes_below(call))

    def _working(self, names: Sequence[str]) -> set[str]:
        """Return those names whose nodes compute a value of the graph."""
        return {name for name in self.rewriter.working.intersection(names) if self.nodes[name].op != "placeholder"}

    def _find_identities(self, regions: Sequence[Region]) -> Mapping[int, list[Place]]:
        """Find the regions that are whole calls of modules. Every call of such a module must be removed."""
        chains = {index: chain for index, region in enumerate(regions) if (chain := self._chain(region)) is not None}
        while True:
            claims: dict[str, dict[int, tuple[Any, ...]]] = {}
            for chain in chains.values():
                for unit in chain:
                    claims.setdefault(unit.path, {})[unit.call] = unit.replacement
            partial = {
                path
                for path, claimed in claims.items()
                if len(claimed) < self.counts[path] or len(set(map(repr, claimed.values()))) > 1
            }
            kept = {index: chain for index, chain in chains.items() if not partial & {unit.path for unit in chain}}
            if len(kept) == len(chains):
                break
            chains = kept
        return {index: list(self._identity_places(chain)) for index, chain in chains.items()}

    def _identity_places(self, chain: list[_Unit]) -> Iterator[Place]:
        """Yield the replacement by identities; and, if all parts are entries of lists, by leaving them out."""
        yield Place(identities=tuple((unit.path, _make_identity(unit.replacement)) for unit in chain))
        owners = [self.root.get_submodule(unit.path.rpartition(".")[0]) for unit in chain]
        if all(isinstance(owner, nn.ModuleList) for owner in owners):
            yield Place(identities=tuple((unit.path, None) for unit in chain))

    def _chain(self, region: Region) -> list[_Unit] | None:
        """Return the module calls that lead, one after the other, from a region's stand-in to its exit."""
        inside, chain, name = self._working(region.nodes), list[_Unit](), region.exit
        while name != region.stand_in:
            unit = self._unit(self.nodes[name], inside, region.stand_in)
            if unit is None:
                return None
            chain.append(unit)
            name = unit.value.name
        if region.contiguous and chain:
            chain[0] = self._make_contiguous(chain[0])
        return chain

    def _make_contiguous(self, unit: _Unit) -> _Unit:
        """Let the replacement of a call return its argument made contiguous."""
        names = inspect.signature(self.root.get_submodule(unit.path).forward).parameters
        return replace(unit, replacement=(*(unit.replacement or (0, next(iter(names), ""), None)), True))

    def _unit(self, result: fx.Node, inside: set[str], stand_in: str) -> _Unit | None:
        """Return the largest call in the region that returns a value, and its argument that leads to the stand-in."""
        calls = [call for call in nested_calls(self.call) if result in nodes_in(call.result)]
        sized = {id(call): self._working([node.name for node in nodes_below(call)]) for call in calls}
        fitting = [call for call in calls if sized[id(call)] and sized[id(call)] <= inside]
        if fitting:
            call = max(fitting, key=lambda call: len(sized[id(call)]))
            return self._make_unit(call, id(call), result, inside, stand_in)
        if result.op == "call_module" and result.name in inside:
            call = TracedCall(str(result.target), result.args, dict(result.kwargs), [], result)
            return self._make_unit(call, id(result), result, inside, stand_in)
        return None

    def _make_unit(
        self, call: TracedCall, identity: int, result: fx.Node, inside: set[str], stand_in: str
    ) -> _Unit | None:
        """Return what replaces one call, all of whose work is removed; None if no identity can."""
        received = {node.name: node for node in nodes_in(call.args) + nodes_in(call.kwargs)}
        leading = [node for name, node in received.items() if name == stand_in]
        leading = leading or [node for name, node in received.items() if name in inside] or list(received.values())
        if len(leading) != 1:
            return None
        (value,) = leading
        if call.args == (value,) and not call.kwargs and call.result is result:
            return _Unit(call.path, identity, value, ())
        names = list(inspect.signature(self.root.get_submodule(call.path).forward).parameters)
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        name = next((name for name in names if given.get(name) is value), None)
        form = _form_of(call.result, result)
        if name is None or (form is None and call.result is not result):
            return None
        return _Unit(call.path, identity, value, (names.index(name), name, form))


def _form_of(output: Any, result: fx.Node) -> Any:
    """Return the form of an output that holds a value once, see `PassThrough`; None if it has no such form."""
    if type(output) not in (tuple, list) or sum(item is result for item in output) != 1:
        return None
    slots = [PassThrough.SLOT if item is result else item for item in output]
    return type(output)(None if nodes_in(item) else item for item in slots)


def _make_identity(replacement: tuple[Any, ...]) -> nn.Module:
    return PassThrough(*replacement) if replacement else nn.Identity()
