"""Finds the regions of an island's graph that an identity can replace, and the reason for each rejected layer.

A region is a set of nodes with one input value (the entry) and one output value (the exit). It is found with
dominators on the value graph: `entry` dominates its nodes (every path to them passes `entry`) and `exit` post-dominates
them (every path from them to the output passes `exit`). If the nodes read no other value from outside, and entry and
exit have the same signature, readers of the exit can read the entry instead. A whole call of a module may read other
values: its result is replaced by the one value that it continues, see `fxprune.graph.residual_paths`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from types import MappingProxyType

import networkx as nx
from torch import fx

from fxprune.graph.fx_utils import (
    SINK,
    SOURCE,
    TRACED_MODULES,
    common_name,
    is_weighted,
    is_within,
    join_path,
    node_parameters,
    value_graph,
)
from fxprune.graph.memory_layouts import layout_conflict
from fxprune.graph.operators import ADDITIONS, is_activation, is_norm
from fxprune.graph.records import FoldedUnit, Region, Rejection
from fxprune.graph.residual_paths import continued_value
from fxprune.graph.symbolic_shapes import SymbolicShapes
from fxprune.runtime.json_text import first_few
from fxprune.runtime.torch_internals import traced_calls


def find_regions(
    island: str, gm: fx.GraphModule, shapes: SymbolicShapes, units: Mapping[str, FoldedUnit] = MappingProxyType({})
) -> tuple[list[Region], list[Rejection]]:
    """Find every region of an island.

    Parameters
    ----------
    island : str
        Path of the island in the model.
    gm : GraphModule
        Graph of the island.
    shapes : SymbolicShapes
        Symbolic shape of each value. Entry and exit must have provably equal shapes for every batch and image size.
    units : mapping of str to FoldedUnit
        Branches that are removed together or not at all, by the path of their module.

    Returns
    -------
    regions : list of Region
        In graph order of their exits. They may nest and overlap. Each removes at least one layer with weights.
    rejections : list of Rejection
        One for each layer with weights that is in no region, and one for each region whose entry and exit have equal
        shapes only at the observed size, whose readers cannot work with the memory layout of its stand-in (nor if it
        is made contiguous), or which contains some branches of a unit and not all of them.

    Examples
    --------
    >>> regions, rejections = find_regions("backbone", gm, shapes)                   # doctest: +SKIP
    """
    finder = _Finder(island, gm, shapes, units)
    wholes = [[whole] for whole in finder.find_whole_calls()]
    found = finder.keep_units_whole([*finder.find_bypasses(), *finder.find_drops(), *wholes])
    regions = _outermost_of_equal_work(finder, finder.choose_by_layout(found))
    named = [finder.make_region(*found) for found in sorted(regions, key=lambda found: finder.order[found[1]])]
    names = {region.name for region in named}
    unproved = [rejection for rejection in dict.fromkeys(finder.unproved) if rejection.name not in names]
    return _number_duplicates(named), [*unproved, *finder.reject_uncovered(regions)]


def _owner(node: fx.Node) -> str:
    """Path of the module whose forward creates a node."""
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return ["", *paths][-2 if node.op == "call_module" and paths else -1]


_FoundRegion = tuple[str, str, str, int]  # kind, exit, stand-in, members as a bit set


class _Finder:
    def __init__(
        self, island: str, gm: fx.GraphModule, shapes: SymbolicShapes, units: Mapping[str, FoldedUnit]
    ) -> None:
        self.island, self.gm, self.shapes = island, gm, shapes
        self.nodes: dict[str, fx.Node] = {node.name: node for node in gm.graph.nodes}
        self.order = {name: index for index, name in enumerate(self.nodes)}
        self.flow = value_graph(gm.graph)
        self.weighted_names = {name for name in self.flow if name in self.nodes and is_weighted(gm, self.nodes[name])}
        self.weighted = self.to_bits(self.weighted_names)
        self.idom = nx.immediate_dominators(self.flow, SOURCE)
        after = nx.immediate_dominators(self.flow.reverse(copy=False), SINK)
        self.dominated = self._subtrees(self.idom)
        self.postdominated = self._subtrees(after)
        self.predecessors = {
            name: self.to_bits(self.flow.predecessors(name)) for name in self.flow if name in self.nodes
        }
        self.owners = {name: _owner(node) for name, node in self.nodes.items()}
        self.unproved: list[Rejection] = []
        self.units = units
        self.unit_calls = self._find_unit_calls()
        self.splitting = 0
        self.made_contiguous: set[_FoundRegion] = set()

    def to_bits(self, names: Iterable[str]) -> int:
        return sum(1 << self.order[name] for name in names if name in self.order)

    def members(self, bits: int) -> list[str]:
        return [name for name, index in self.order.items() if bits >> index & 1]

    def _subtrees(self, parent: dict[str, str]) -> dict[str, int]:
        """Return the subtree of each node in a dominator tree as a bit set. The node is part of its subtree."""
        tree = nx.DiGraph((above, below) for below, above in parent.items() if above != below and above is not None)
        tree.add_nodes_from(self.flow)
        sets: dict[str, int] = {}
        for name in reversed(list(nx.topological_sort(tree))):
            sets[name] = self.to_bits([name])
            for below in tree.successors(name):
                sets[name] |= sets[below]
        return sets

    def closed_region(self, entry: str, exit_: str) -> int:
        """Return the region between two values as a bit set; 0 if its nodes read another value from outside."""
        inside = self.postdominated[exit_] & self.dominated[entry] & ~self.to_bits([entry])
        allowed = inside | self.to_bits([entry])
        closed = bool(inside >> self.order[exit_] & 1) and all(
            not self.predecessors[name] & ~allowed for name in self.members(inside)
        )
        return inside if closed else 0

    def dominators(self, name: str) -> Iterator[str]:
        """Yield the dominators of a node, nearest first."""
        while (parent := self.idom.get(name)) not in (None, name, SOURCE):
            assert parent is not None
            yield parent
            name = parent

    def find_bypasses(self) -> Iterator[list[_FoundRegion]]:
        """Yield, for each value, the region from the nearest earlier value that can replace it.

        The region comes in several versions: without its epilogue, and with more and more of it.
        """
        nearest: dict[str, tuple[str, int]] = {}
        for exit_ in self.order:
            if exit_ not in self.flow or exit_ not in self.shapes.values:
                continue
            for entry in self.dominators(exit_):
                if not self.shapes.equal_when_observed(entry, exit_) or not (
                    inside := self.closed_region(entry, exit_)
                ):
                    continue
                if self.shapes.provably_equal(entry, exit_):
                    nearest[exit_] = (entry, inside)
                    break
                self._note_unproved(entry, exit_, inside)
        for exit_, (entry, inside) in nearest.items():
            if inside & self.weighted:
                yield list(self._with_epilogue(entry, exit_, inside, nearest))

    def _with_epilogue(
        self, entry: str, exit_: str, inside: int, nearest: dict[str, tuple[str, int]]
    ) -> Iterator[_FoundRegion]:
        """Yield a region, then extend it, one by one, by the nodes that finish its exit: a layer's norm, activations.

        It ends at the first value with several readers. A norm after a sum stays: it belongs to the next layer.
        """
        while True:
            yield "bypass", exit_, entry, inside
            (follower, *others) = list(self.flow.successors(exit_)) or [SINK]
            if others or follower == SINK or nearest.get(follower, ("",))[0] != exit_:
                return
            node = self.nodes[follower]
            finishes = is_activation(self.gm, node) or (exit_ in self.weighted_names and is_norm(self.gm, node))
            finishes = finishes or any(own >> self.order[follower] & 1 for own in self.unit_calls.values())
            if not finishes or not (wider := self.closed_region(entry, follower)):
                return
            exit_, inside = follower, wider

    def find_whole_calls(self) -> Iterator[_FoundRegion]:
        """Yield the bypass of each whole call of a module whose own forward adds several branches to its input.

        An encoder layer adds its attention, and then its MLP: each of both is a region, and so is the layer. Its
        branches may read other values from outside, such as positions.
        """
        for path, names in self._calls():
            members = set(names)
            exits = [name for name in names if any(user not in members for user in self.flow.successors(name))]
            found = self._stand_in_of_call(exits[0], members) if len(exits) == 1 else None
            stand_in, way = found or ("", set[str]())
            sums = [name for name in way if self.owners[name] == path and self.nodes[name].target in ADDITIONS]
            if any(self._divides(name, exits[0], members) for name in sums):
                yield "bypass", exits[0], stand_in, self.to_bits(members)

    def _stand_in_of_call(self, exit_: str, members: set[str]) -> tuple[str, set[str]] | None:
        """Return the value that can replace the result of a call, and the nodes between both."""
        entry = next((name for name in self.dominators(exit_) if name not in members), None)
        if entry is None or not (inside := self.closed_region(entry, exit_)) or inside & ~self.to_bits(members):
            return continued_value(self.gm, self.flow, self.shapes, exit_, members)
        way = members.intersection(self.dominators(exit_))
        return (entry, way) if self.shapes.provably_equal(entry, exit_) else None

    def _divides(self, name: str, exit_: str, members: set[str]) -> bool:
        """Whether a value in a call has the shape of its result, and layers with weights before and after it."""
        before = nx.ancestors(self.flow, name) & members
        parts = self.to_bits(before), self.to_bits(members - before)
        return self.shapes.provably_equal(name, exit_) and all(part & self.weighted for part in parts)

    def _calls(self) -> list[tuple[str, list[str]]]:
        """Return the path of the module and the values of each call of a module that was traced into."""
        calls: dict[str, tuple[str, list[str]]] = {}
        for name, node in self.nodes.items():
            inside = name in self.flow and node.op != "placeholder"
            stack = {"": ("", None), **node.meta.get("nn_module_stack", {})} if inside else {}
            for key, (path, _) in stack.items():
                calls.setdefault(key, (path, []))[1].append(name)
        return list(calls.values())

    def find_drops(self) -> Iterator[list[_FoundRegion]]:
        """Yield for each addition the operands whose branch has no other reader. Inputs of the graph stay."""
        inputs = self.to_bits(name for name, node in self.nodes.items() if node.op == "placeholder")
        for name, node in self.nodes.items():
            operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
            if node.target not in ADDITIONS or len(operands) != 2 or node.kwargs or operands[0] is operands[1]:
                continue
            for gone, kept in (operands, operands[::-1]):
                if gone.name not in self.postdominated or kept.name not in self.flow:
                    continue
                branch = self.postdominated[gone.name] & ~inputs
                alone = list(self.flow.successors(gone.name)) == [name]
                same = self.shapes.provably_equal(kept.name, name)
                if alone and branch & self.weighted and not self.closed_region(kept.name, name) and same:
                    yield [("drop", name, kept.name, branch | self.to_bits([name]))]

    def _find_unit_calls(self) -> dict[tuple[str, str], int]:
        """Return the nodes that read the branches of a unit as a bit set, by path of its module and call."""
        owners = {part: path for path, unit in self.units.items() for part in unit.parts}
        calls: dict[tuple[str, str], int] = {}
        for name, node in self.nodes.items() if owners else ():
            paths = {owners.get(join_path(self.island, path)) for path, _ in node_parameters(self.gm, node)}
            for unit in paths - {None} if name in self.flow else ():
                inside = (key for key, path in traced_calls(node) if join_path(self.island, path) == unit)
                call = str(unit), next(inside, "")
                calls[call] = calls.get(call, 0) | self.to_bits([name])
        return calls

    def keep_units_whole(self, found: list[list[_FoundRegion]]) -> list[list[_FoundRegion]]:
        """Leave out, and reject, the regions that contain some branches of a unit and not all of them."""
        whole: list[list[_FoundRegion]] = []
        for versions in found:
            kept = [version for version in versions if self._split_unit(version[3]) is None]
            split = self._split_unit(versions[-1][3])
            if kept:
                whole.append(kept)
            elif split is not None:
                self.splitting |= versions[-1][3]
                self.unproved.append(Rejection(self.make_region(*versions[-1]).name, self._unit_reason(split)))
        return whole

    def _split_unit(self, inside: int) -> str | None:
        """Return a unit of which a set of nodes reads some branches and not all of them; None without one."""
        for (unit, _), own in self.unit_calls.items():
            beyond = unit != self.island and is_within(self.island, unit)  # others are in other graphs
            if own & inside and (beyond or own & ~inside):
                return unit
        return None

    def _unit_reason(self, unit: str) -> str:
        return (
            f"{unit}.{self.units[unit].method}() folds it and other branches into one layer: they go together or stay"
        )

    def choose_by_layout(self, found: list[list[_FoundRegion]]) -> list[_FoundRegion]:
        """Choose the longest version of each region whose readers work with the memory layout of its stand-in.

        Without one, it is the longest whose readers work with a contiguous stand-in. The last region comes first: a
        plan may remove it together with the earlier ones.
        """
        chosen: list[_FoundRegion] = []
        later: dict[str, list[tuple[str, bool]]] = {}
        for versions in sorted(found, key=lambda versions: -self.order[versions[-1][1]]):
            conflict = ""
            for contiguous, version in product((False, True), reversed(versions)):
                _, exit_, stand_in, _ = version
                reason = layout_conflict(self.shapes, exit_, stand_in, later, contiguous)
                if not reason:
                    chosen.append(version)
                    later.setdefault(exit_, []).append((stand_in, contiguous))
                    self.made_contiguous |= {version} if contiguous else set()
                    break
                conflict = conflict if contiguous else reason
            else:
                self.unproved.append(Rejection(self.make_region(*versions[-1]).name, conflict))
        return chosen[::-1]

    def _note_unproved(self, entry: str, exit_: str, inside: int) -> None:
        if inside & self.weighted:
            name = self.make_region("bypass", exit_, entry, inside).name
            reason = "entry and exit have the same shape at the observed size, but not provably at every size"
            self.unproved.append(Rejection(name, reason))

    def layers_of(self, bits: int) -> list[str]:
        """Return the paths, below the island, of the modules or constants that hold the weights of a set of nodes."""
        paths: dict[str, None] = {}
        for name in self.members(bits & self.weighted):
            node = self.nodes[name]
            read = [str(node.target)] if node.op == "call_module" else [p for p, _ in node_parameters(self.gm, node)]
            paths |= dict.fromkeys(read)
        return list(paths)

    def make_region(self, kind: str, exit_: str, stand_in: str, inside: int) -> Region:
        layers = self.layers_of(inside)
        everything = self.layers_of(self.weighted)
        others = [path for path in everything if path not in set(layers)]
        called = self.gm.meta.get(TRACED_MODULES, ())
        whole = bool(self.island) and not others
        name = self.island if whole else join_path(self.island, common_name(layers, others, called))
        return Region(
            name=name,
            kind=kind,
            island=self.island,
            exit=exit_,
            stand_in=stand_in,
            nodes=tuple(self.members(inside)),
            layers=tuple(join_path(self.island, layer) for layer in layers),
            contiguous=(kind, exit_, stand_in, inside) in self.made_contiguous,
        )

    def reject_uncovered(self, regions: list[_FoundRegion]) -> Iterator[Rejection]:
        """Yield a rejection, with its reason, for every layer with weights that is in no region."""
        covered = 0
        for _, _, _, inside in regions:
            covered |= inside
        unproved = {rejection.name for rejection in self.unproved}
        for name in self.members(self.weighted & ~covered):
            layer = join_path(self.island, (self.layers_of(self.to_bits([name])) or [name])[0])
            if not {layer, self.make_region("bypass", name, name, self.to_bits([name])).name} & unproved:
                yield Rejection(layer, self._rejection_reason(name))

    def _rejection_reason(self, name: str) -> str:
        bits = self.to_bits([name])
        if bits & self.splitting and (unit := self._split_unit(bits)) is not None:
            return self._unit_reason(unit)
        if name not in self.shapes.values:
            return self.shapes.failure or "its output is not one tensor"
        for entry in self.dominators(name):
            if self.shapes.equal_when_observed(entry, name):
                between = set(self.members(self.to_bits(nx.ancestors(self.flow, name)) & self.dominated[entry])) - {
                    entry
                }
                readers = {reader for member in between for reader in self.flow.successors(member)}
                outside = sorted("the output" if reader == SINK else reader for reader in readers - between - {name})
                if outside:
                    others = first_few(outside)
                    return f"{entry!r} could be its stand-in, but values between them are also read by {others}"
        sources = [source.name for source in self.nodes[name].all_input_nodes if source.name in self.shapes.values]
        before = "x".join(map(str, self.shapes.observed_shape(sources[0])[1:])) if sources else "nothing"
        after = "x".join(map(str, self.shapes.observed_shape(name)[1:]))
        change = f"it turns {before} into {after}" if before != after else "its shape is not provably that of its input"
        return f"{change}, and no part of the graph around it starts and ends with the same shape"


def _outermost_of_equal_work(finder: _Finder, found: list[_FoundRegion]) -> list[_FoundRegion]:
    """Keep the outermost of nested regions that remove the same layers: it also removes the nodes without weights."""
    kept: list[_FoundRegion] = []
    for candidate in found:
        _, _, _, inside = candidate
        rivals = [
            other
            for other in found
            if other is not candidate and other[3] & finder.weighted == inside & finder.weighted
        ]
        if not any(other[3] | inside == other[3] and other[3] != inside for other in rivals):
            kept.append(candidate)
    return kept


def _number_duplicates(regions: list[Region]) -> list[Region]:
    """Number regions that have the same name: ``fc``, ``fc#2``."""
    seen: dict[str, int] = {}
    distinct = []
    for region in regions:
        seen[region.name] = count = seen.get(region.name, 0) + 1
        suffix = f"#{count}" if count > 1 else ""
        distinct.append(Region(**{**region.__dict__, "name": region.name + suffix}))
    return distinct
