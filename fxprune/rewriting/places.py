"""Finds the places in the module tree where a region can be removed, smallest first."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fxprune.capture.tracer import TRACED_CALL, TracedCall
from fxprune.graph.fx_utils import value_graph
from fxprune.graph.records import Region
from fxprune.rewriting.body_graph import nested_calls, nodes_below, nodes_in, received_values
from fxprune.rewriting.pruned_module import PassThrough


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
    traced : GraphModule
        Its graph.
    """

    def __init__(self, root: nn.Module, traced: fx.GraphModule) -> None:
        self.root = root
        self.call: TracedCall = traced.meta[TRACED_CALL]
        self.alive = set(value_graph(traced.graph))
        self.nodes = {node.name: node for node in traced.graph.nodes}
        self.calls: dict[str, list[TracedCall | fx.Node]] = {}
        self.parents: dict[int, TracedCall] = {}
        for call in nested_calls(self.call):
            self.calls.setdefault(call.path, []).append(call)
            for step in call.steps:
                if isinstance(step, TracedCall):
                    self.parents[id(step)] = call
                elif step.op == "call_module":
                    self.calls.setdefault(str(step.target), []).append(step)

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
        return {name for name in names if name in self.alive and self.nodes[name].op not in ("get_attr", "placeholder")}

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
                if len(claimed) < len(self.calls[path]) or len(set(map(repr, claimed.values()))) > 1
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
            return self._make_unit(call.path, id(call), call.args, call.kwargs, call.result, result, inside, stand_in)
        if result.op == "call_module" and result.name in inside:
            path = str(result.target)
            return self._make_unit(path, id(result), result.args, result.kwargs, result, result, inside, stand_in)
        return None

    def _make_unit(
        self,
        path: str,
        identity: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        result: fx.Node,
        inside: set[str],
        stand_in: str,
    ) -> _Unit | None:
        received = {node.name: node for node in nodes_in(args) + nodes_in(dict(kwargs))}
        leading = [node for name, node in received.items() if name == stand_in]
        leading = leading or [node for name, node in received.items() if name in inside]
        if len(leading) != 1 and len(received) != 1:
            return None
        value = leading[0] if len(leading) == 1 else next(iter(received.values()))
        if args == (value,) and not kwargs and output is result:
            return _Unit(path, identity, value, ())
        names = list(inspect.signature(self.root.get_submodule(path).forward).parameters)
        if value in args:
            position = args.index(value)
        else:
            key = next((key for key, given in kwargs.items() if given is value), None)
            if key not in names:
                return None
            position = names.index(str(key))
        if position >= len(names):
            return None
        form = None
        if output is not result:
            if not isinstance(output, (tuple, list)) or sum(item is result for item in output) != 1:
                return None
            slots = [PassThrough.SLOT if item is result else item for item in output]
            form = (tuple if isinstance(output, tuple) else list)(None if nodes_in(item) else item for item in slots)
        return _Unit(path, identity, value, (position, names[position], form))


def _make_identity(replacement: tuple[Any, ...]) -> nn.Module:
    return PassThrough(*replacement) if replacement else nn.Identity()
