"""Rewrites the graph of a whole island without its removed regions, and compares it with a rewritten module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxprune.capture.channels import channels_of
from fxprune.capture.module_trace import Untraced, trace_module
from fxprune.capture.tracer import TRACED_CALL, TracedCall
from fxprune.errors import PlanError
from fxprune.graph.fx_utils import CONSTANT_ARGUMENTS, SINK, SOURCE, get_attribute, graph_structure, value_graph
from fxprune.graph.records import Region
from fxprune.passes.bypass import bypass_regions
from fxprune.passes.concat import NARROWED_WEIGHTS, contiguous_values
from fxprune.passes.dead_code import remove_dead_code
from fxprune.passes.pipeline import simplify
from fxprune.rewriting.body_graph import is_made_tensor, nested_calls
from fxprune.rewriting.pruned_module import PassThrough
from fxprune.rewriting.verification import verify_graph


@dataclass(frozen=True)
class SimplifiedGraph:
    """A graph without operations that nothing reads or that compute nothing.

    Attributes
    ----------
    gm : GraphModule
        The graph, functional.
    spared : int
        Number of nodes that the simplification removed from the live graph.
    narrowed : mapping of str to tuple of int
        New shapes of the weights that became narrower, by path below the island.
    """

    gm: fx.GraphModule
    spared: int
    narrowed: Mapping[str, tuple[int, ...]]


def simplified(module: nn.Module, graph: fx.Graph, channels: Mapping[str, int], model: nn.Module) -> SimplifiedGraph:
    """Simplify a copy of a module's graph. The module is not changed."""
    gm = fx.GraphModule(module, copy_graph(graph), type(module).__name__)
    gm.training = module.training
    remove_dead_code(gm)
    live = len(gm.graph.nodes)
    simplify(gm, channels, model)
    return SimplifiedGraph(gm, live - len(gm.graph.nodes), gm.meta[NARROWED_WEIGHTS])


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph; nodes keep their names."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


class IslandRewriter:
    """Rewrites the graph of an island, and says whether a rewritten module computes the same.

    Parameters
    ----------
    name : str
        Path of the island, for messages.
    traced : GraphModule
        Its graph; not changed.
    opaque : collection of str
        Paths below the island that stay one node.
    model : Module
        The model that contains the island. Weights that it shares with other parts are not narrowed.

    Attributes
    ----------
    channels : mapping of str to int
        Number of channels of the values, by node name.
    contiguous : set of str
        Names of the values that the program itself makes contiguous.
    working : set of str
        Names of the nodes that compute a value which the output needs.
    before : SimplifiedGraph
        The island's graph with all regions.
    owners : mapping of str to str
        Path of the module whose forward makes a node, by node name.
    """

    def __init__(self, name: str, traced: fx.GraphModule, opaque: Collection[str], model: nn.Module) -> None:
        self.name, self.traced, self.opaque, self.model = name, traced, frozenset(opaque), model
        self.channels = channels_of(traced)
        self.contiguous = contiguous_values(traced)
        self.working = {name for name in value_graph(traced.graph) if name not in (SOURCE, SINK)}
        self._calls: dict[str, list[TracedCall]] = {}
        self.owners: dict[str, str] = {}
        for call in nested_calls(traced.meta[TRACED_CALL]):
            self._calls.setdefault(call.path, []).append(call)
            self.owners |= {step.name: call.path for step in call.steps if isinstance(step, fx.Node)}
        self.before = simplified(traced, traced.graph, self.channels, model)

    def calls_of(self, path: str) -> list[TracedCall]:
        """Return all calls of a module of the island whose forward was traced."""
        return self._calls[path]

    def rewrite(self, removed: Sequence[Region]) -> SimplifiedGraph:
        """Return the island's graph without the removed regions, as one graph.

        Raises
        ------
        PlanError
            If a removed node is still read.
        """
        gm = fx.GraphModule(self.traced, copy_graph(self.traced.graph))
        arguments = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
        stand_ins = {region.exit: region.stand_in for region in removed}
        bypass_regions(gm, stand_ins, {region.exit for region in removed if region.contiguous})
        result = simplified(self.traced, gm.graph, self.channels, self.model)
        verify_graph(self.name, arguments, result.gm, {node for region in removed for node in region.nodes})
        return result

    def agrees(self, module: nn.Module, identities: Collection[str], wanted: SimplifiedGraph) -> bool:
        """Whether a rewritten module runs the same operations as the rewritten graph, and no more than needed.

        Parameters
        ----------
        module : Module
            The island's module with some parts replaced.
        identities : collection of str
            Paths of the parts that return an argument. What overwrites their output overwrites this argument.
        wanted : SimplifiedGraph
            Output of `rewrite`.
        """
        if "" in identities:
            return _returns_argument(wanted.gm, module)
        constants = self.traced.meta[CONSTANT_ARGUMENTS]
        traced = trace_module(module, self.opaque, fixed_opaque=True, constants=constants, identities=identities)
        if isinstance(traced, Untraced):
            return False
        found = simplified(traced.gm, traced.gm.graph, self.channels, self.model)
        same = _comparable(found.gm) == _comparable(wanted.gm)
        return same and not found.narrowed and found.spared <= self.before.spared


def _comparable(gm: fx.GraphModule) -> list[Any]:
    """Return the structure of a graph. Tensors that its program makes appear by value: their names may differ."""
    rows = zip(gm.graph.nodes, graph_structure(gm.graph), strict=True)
    return [
        ("get_attr", repr(get_attribute(gm, str(node.target)).tolist())) if is_made_tensor(node) else row
        for node, row in rows
    ]


def _returns_argument(gm: fx.GraphModule, module: nn.Module) -> bool:
    """Whether a graph does what an identity or a `PassThrough` does: it returns one of its arguments."""
    *arguments, output = gm.graph.nodes
    copies = isinstance(module, PassThrough) and module.contiguous
    copied = arguments.pop() if copies and arguments else None
    position = module.position if isinstance(module, PassThrough) else 0
    form = module.form if isinstance(module, PassThrough) else None
    value: Any = output.args[0]
    if form is not None:
        if not isinstance(value, (tuple, list)) or len(value) != len(form):
            return False
        others = [item for item, slot in zip(value, form, strict=True) if slot != PassThrough.SLOT]
        constants = [slot for slot in form if slot != PassThrough.SLOT]
        same = others == constants and isinstance(value, type(form))
        value = value[form.index(PassThrough.SLOT)] if same else None
    if copies:
        value = copied.args[0] if copied is not None and value is copied and copied.target == "contiguous" else None
    placeholders = all(node.op == "placeholder" for node in arguments)
    return placeholders and position < len(arguments) and value is arguments[position]


def check_nodes(removed: Sequence[Region], gm: fx.GraphModule) -> None:
    """Raise `PlanError` if a region names a node that the graph does not have, or a stand-in after its exit."""
    order = {node.name: index for index, node in enumerate(gm.graph.nodes)}
    for region in removed:
        for name in (region.exit, region.stand_in):
            if name not in order:
                raise PlanError(f"region {region.name!r} names {name!r}, which is no node of its island's graph")
        if order[region.stand_in] >= order[region.exit]:
            raise PlanError(f"region {region.name!r} reads {region.stand_in!r}, which comes after {region.exit!r}")
