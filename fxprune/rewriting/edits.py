"""Changes a module tree: parts become identities, modules become graphs, layers become narrower. All can be undone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxprune.capture.tracer import TracedCall
from fxprune.graph.fx_utils import (
    CONSTANT_ARGUMENTS,
    INPLACE_ORIGIN,
    OVERWRITES,
    get_attribute,
    graph_structure,
    is_within,
    join_path,
)
from fxprune.graph.operators import may_be_overwritten
from fxprune.graph.records import Region
from fxprune.passes.bypass import bypass_regions
from fxprune.passes.concat import NARROWED_WEIGHTS
from fxprune.passes.in_place import reinplace
from fxprune.passes.pipeline import simplify
from fxprune.rewriting.body_graph import (
    BodyError,
    build_body,
    children_to_inline,
    is_made_tensor,
    nested_calls,
    produced_values,
)
from fxprune.rewriting.places import Place
from fxprune.rewriting.pruned_module import PrunedModule, plain_attributes
from fxprune.rewriting.whole_graph import IslandRewriter, SimplifiedGraph


@dataclass(frozen=True)
class Placement:
    """What a rewrite of an island changed.

    Attributes
    ----------
    identities : tuple of str
        Paths, below the island, of the parts that became identities.
    graphs : tuple of str
        Paths, below the island, of the modules whose forward became a graph.
    narrowed : mapping of str to tuple of int
        New shapes of the weights that became narrower, by path below the island.
    undo : callable
        Takes the changes back.
    """

    identities: tuple[str, ...]
    graphs: tuple[str, ...]
    narrowed: Mapping[str, tuple[int, ...]]
    undo: Callable[[], None] = field(repr=False)


class Edits:
    """Changes of one island.

    Parameters
    ----------
    shell : Module
        The model, as a part of an outer module; changed.
    path : str
        Path of the island in it.
    rewriter : IslandRewriter
        Rewrites the island's graph as a whole.

    Attributes
    ----------
    placement : Placement
        What was changed.

    Examples
    --------
    >>> edits = Edits(shell, "root", rewriter)                     # doctest: +SKIP
    >>> edits.succeed([region], [Place("layer3.1", "none")], rewriter.rewrite([region]))     # doctest: +SKIP
    True
    """

    def __init__(self, shell: nn.Module, path: str, rewriter: IslandRewriter) -> None:
        self.shell, self.path, self.rewriter = shell, path, rewriter
        self.undos: list[Callable[[], object]] = []
        self.placement = Placement((), (), {}, self.undo)

    @property
    def module(self) -> nn.Module:
        """The island's module, with the changes so far."""
        return self.shell.get_submodule(self.path)

    def undo(self) -> None:
        """Take all changes back."""
        while self.undos:
            self.undos.pop()()

    def succeed(self, regions: Sequence[Region], places: Sequence[Place], wanted: SimplifiedGraph) -> bool:
        """Make the changes. Returns whether the module then computes what the whole rewritten graph computes."""
        try:
            self.make(regions, places, wanted)
        except BodyError:
            return False
        if not self.rewriter.agrees(self.module, self.placement.identities, wanted):
            return False
        state, expected = self.module.state_dict(), wanted.gm.state_dict()
        return all(key in state and state[key].shape == value.shape for key, value in expected.items())

    def make(self, regions: Sequence[Region], places: Sequence[Place], wanted: SimplifiedGraph) -> Placement:
        """Replace parts by identities and modules by graphs, inner ones first; then narrow layers."""
        identities, groups = self._group(regions, places)
        for path, new in identities.items():
            if new is None:
                self._leave_out(path)
            else:
                vars(new).update(plain_attributes(self.module.get_submodule(path)) | vars(new))
                self._replace(path, new)
        for path in sorted(groups, key=lambda path: (-path.count(".") if path else 1, path)):
            self._make_graph(path, *groups[path])
        self._narrow(wanted)
        self._clear_flags(wanted, {inner for path, (inlined, _) in groups.items() for inner in {path, *inlined}})
        self.placement = Placement(tuple(identities), tuple(groups), wanted.narrowed, self.undo)
        return self.placement

    def _group(
        self, regions: Sequence[Region], places: Sequence[Place]
    ) -> tuple[dict[str, nn.Module | None], dict[str, tuple[set[str], list[Region]]]]:
        """Return the parts to replace, and for each module that becomes a graph its inlined children and regions."""
        everything = [place.path for place in places if place.inlined == "all"]
        identities: dict[str, nn.Module | None] = {}
        groups: dict[str, list[Region]] = {}
        levels: dict[str, str] = {}
        for region, place in zip(regions, places, strict=True):
            paths = [path for path, _ in place.identities] or [place.path]
            around = [path for path in everything if all(is_within(inner, path) for inner in paths)]
            if place.identities and not around:
                identities |= dict(place.identities)
                continue
            path = min(around, key=len, default=place.path)
            groups.setdefault(path, []).append(region)
            touched = "touched" in (place.inlined, levels.get(path))
            levels[path] = "all" if around else "touched" if touched else "none"
        inlined = {path: self._inlined(path, groups[path], levels[path]) for path in groups}
        while inner := [(path, other) for path in groups for other in inlined[path] & set(groups)]:
            path, other = inner[0]
            groups[path] += groups.pop(other)
            inlined[path] = self._inlined(path, groups[path], levels[path]) | inlined.pop(other)
        return identities, {path: (inlined[path], groups[path]) for path in groups}

    def _inlined(self, path: str, regions: Sequence[Region], level: str) -> set[str]:
        """Return the paths of the modules below a module whose forwards become part of its graph."""
        if level == "none":
            return set()
        calls = self.rewriter.calls_of(path)
        if level == "all":
            return {inner.path for call in calls for inner in nested_calls(call)} - {path}
        return {found for call in calls for found in children_to_inline(call, regions, self.rewriter.working)}

    def _leave_out(self, path: str) -> None:
        """Remove an entry of a list of modules; the others keep their keys."""
        owner_path, _, name = path.rpartition(".")
        owner = self.module.get_submodule(owner_path)
        entries = dict(owner.named_children())
        delattr(owner, name)
        self.undos.append(lambda: _restore_children(owner, entries))

    def _narrow(self, wanted: SimplifiedGraph) -> None:
        """Put the narrower layers of the whole rewritten graph in place."""
        called = {str(node.target) for node in wanted.gm.graph.nodes if node.op == "call_module"}
        for target in {target for target in called if any(is_within(key, target) for key in wanted.narrowed)}:
            self._replace(target, wanted.gm.get_submodule(target))

    def _replace(self, path: str, new: nn.Module) -> None:
        """Replace a part of the island, under every path of it."""
        full = join_path(self.path, path)
        old = self.shell.get_submodule(full)
        new.training = old.training
        if path and (outside := self._paths_outside(path)):
            raise BodyError(f"{path!r} is also a part of {outside[0]!r}")
        for name in self._paths_of(old):
            self.shell.set_submodule(name, new)
            self.undos.append(lambda name=name: self.shell.set_submodule(name, old))  # type: ignore[misc]

    def _paths_of(self, part: nn.Module) -> list[str]:
        return [name for name, other in self.shell.named_modules(remove_duplicate=False) if name and other is part]

    def _paths_outside(self, path: str) -> list[str]:
        """Return the paths, outside of the island, of a part of it."""
        paths = self._paths_of(self.module.get_submodule(path))
        return [name for name in paths if not is_within(name, self.path)]

    def _make_graph(self, path: str, inlined: set[str], regions: Sequence[Region]) -> None:
        """Replace a module of the island by a `PrunedModule`."""
        module = self.module.get_submodule(path)
        graphs = [self._body(call, module, inlined, regions) for call in self.rewriter.calls_of(path)]
        first = graphs[0]
        if any(graph_structure(other[1].graph) != graph_structure(first[1].graph) for other in graphs[1:]):
            raise BodyError(f"{path!r} is called in several ways")
        before, gm = first
        for inner in sorted(inlined):
            self._make_holder(inner)
        new = PrunedModule(module, gm.graph, ())
        self._prune_parts(new, before, gm)
        self._replace(path, new)

    def _make_holder(self, path: str) -> None:
        """Replace a module that is no longer called by one that only holds its parts; containers stay."""
        part = self.module.get_submodule(path)
        shared = self._paths_outside(path)
        if not shared and not isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict, PrunedModule)):
            holder = nn.Module()
            for name, child in part.named_children():
                holder.add_module(name, child)
            saved = part.state_dict()
            for name, value in part.named_parameters(recurse=False):
                holder.register_parameter(name, value)
            for name, buffer in part.named_buffers(recurse=False):
                holder.register_buffer(name, buffer, persistent=name in saved)
            self._replace(path, holder)

    def _body(
        self, call: TracedCall, module: nn.Module, inlined: set[str], regions: Sequence[Region]
    ) -> tuple[set[str], fx.GraphModule]:
        """Return the targets of a module's own graph before the removal, and the graph after it."""
        body = build_body(self.module, call, inlined, self.rewriter.traced.meta[CONSTANT_ARGUMENTS])
        self._add_made_tensors(module, body.graph)
        try:
            gm = fx.GraphModule(module, body.graph)
        except AttributeError as error:
            raise BodyError(f"another removal took a part that it reads: {error}") from None
        before = _read_paths(gm)
        gm.training = module.training
        names = {name: node.name for name, node in body.nodes.items()}
        produced = produced_values(call, inlined)
        here = [region for region in regions if region.exit in produced and region.stand_in in names]
        if not here:
            raise BodyError("nothing in it is removed")
        stand_ins = {names[region.exit]: names[region.stand_in] for region in here}
        bypass_regions(gm, stand_ins, {names[region.exit] for region in here if region.contiguous})
        channels = {names[name]: width for name, width in self.rewriter.channels.items() if name in names}
        contiguous = {names[name] for name in self.rewriter.contiguous if name in names}
        simplify(gm, channels, self.shell, contiguous)
        reinplace(gm)
        return before, gm

    def _add_made_tensors(self, module: nn.Module, graph: fx.Graph) -> None:
        """Give a module the tensors that its program made while it was traced, as buffers that are not saved."""
        for node in graph.nodes:
            name = str(node.target)
            if is_made_tensor(node) and not hasattr(module, name):
                value = getattr(self.rewriter.traced, name)
                module.register_buffer(name, value, persistent=False)
                self.undos.append(lambda name=name: delattr(module, name))  # type: ignore[misc]

    def _prune_parts(self, new: PrunedModule, before: set[str], gm: fx.GraphModule) -> None:
        """Remove from a module what its new graph no longer reads, and put narrowed layers in."""
        after = _read_paths(gm)
        narrowed = {target for target in after if any(is_within(key, target) for key in gm.meta[NARROWED_WEIGHTS])}
        gone = {target for target in before - after if not any(is_within(other, target) for other in after)}
        for target in narrowed:
            self._set(new, target, gm.get_submodule(target))
        tops = {_outermost_dead(target, gone, after, new) for target in gone}
        for target in tops:
            self._delete(new, target)
        names = {path.partition(".")[0] for path in narrowed | tops}
        vars(new)["changed_names"] = new.changed_names | names

    def _set(self, new: nn.Module, target: str, layer: nn.Module) -> None:
        old = new.get_submodule(target)
        new.set_submodule(target, layer)
        self.undos.append(lambda: new.set_submodule(target, old))

    def _delete(self, new: nn.Module, target: str) -> None:
        """Remove a part or a tensor. An entry of a container becomes an identity: the others keep their index."""
        owner_path, _, name = target.rpartition(".")
        owner = new.get_submodule(owner_path)
        if isinstance(owner, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) and name in dict(owner.named_children()):
            self._set(new, target, nn.Identity())
            return
        old, persistent = getattr(owner, name), name in owner.state_dict()
        delattr(owner, name)
        if isinstance(old, (nn.Module, nn.Parameter)):
            self.undos.append(lambda: setattr(owner, name, old))
        else:
            self.undos.append(lambda: owner.register_buffer(name, old, persistent=persistent))

    def _clear_flags(self, wanted: SimplifiedGraph, in_graphs: Collection[str]) -> None:
        """Clear the in-place flag of layers that would overwrite a value that is still needed.

        `in_graphs` are the paths of the modules whose forward is part of a graph. Raises `BodyError` if code that stays
        Python would overwrite such a value.
        """
        originals = {node.name: node.all_input_nodes for node in self.rewriter.before.gm.graph.nodes}
        for node in wanted.gm.graph.nodes:
            layer = wanted.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            written = node.meta.get(OVERWRITES) or INPLACE_ORIGIN in node.meta or getattr(layer, "inplace", False)
            if written is False or not node.all_input_nodes:
                continue
            source, before = node.all_input_nodes[0], originals.get(node.name, [])[:1]
            owner = self.rewriter.owners.get(node.name, "")
            in_graph = owner in in_graphs
            if may_be_overwritten(wanted.gm, source) or not (
                in_graph or [value.name for value in before] != [source.name]
            ):
                continue
            if layer is not None:
                layer.inplace = False  # type: ignore[assignment]
                self.undos.append(lambda layer=layer: setattr(layer, "inplace", True))  # type: ignore[misc]
            elif not in_graph:
                raise BodyError(f"{node.name!r} overwrites a value that others read")


def _read_paths(gm: fx.GraphModule) -> set[str]:
    """Return the paths of the modules that a graph calls and of the tensors that it reads."""
    return {
        str(node.target)
        for node in gm.graph.nodes
        if node.op == "call_module"
        or (node.op == "get_attr" and isinstance(get_attribute(gm, str(node.target)), torch.Tensor))
    }


def _restore_children(owner: nn.Module, entries: Mapping[str, nn.Module]) -> None:
    """Give a list of modules its entries back, in their order."""
    for name in [name for name, _ in owner.named_children()]:
        delattr(owner, name)
    for name, part in entries.items():
        owner.add_module(name, part)


def _outermost_dead(target: str, gone: set[str], after: set[str], new: nn.Module) -> str:
    """Return the outermost path around a removed target of which all tensors are removed, but no list of modules.

    Paths that the new graph reads (`after`), or that lie in them, are left out.
    """
    atoms = target.split(".")
    for length in range(1, len(atoms)):
        outer = ".".join(atoms[:length])
        part = new.get_submodule(outer)
        tensors = [join_path(outer, key) for key, _ in (*part.named_parameters(), *part.named_buffers())]
        read = any(is_within(other, outer) or is_within(outer, other) for other in after)
        listed = isinstance(part, (nn.ModuleList, nn.ModuleDict))
        if not read and not listed and all(is_within(key, gone) for key in tensors):
            return outer
    return target
