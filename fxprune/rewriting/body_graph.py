"""Builds the graph of one module's own forward from the graph of a larger part: its children stay calls."""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxprune.capture.passed_on import passed_on_arguments
from fxprune.capture.tracer import TracedCall
from fxprune.graph.fx_utils import check_constant, is_within, join_path
from fxprune.graph.records import Region
from fxprune.runtime.torch_internals import MADE_TENSOR


class BodyError(Exception):
    """A module's own forward cannot be written as a graph."""


@dataclass(frozen=True)
class Body:
    """The graph of one module's own forward.

    Attributes
    ----------
    graph : Graph
        Its targets are paths below the module.
    nodes : mapping of str to Node
        The node of this graph that holds a value of the larger graph, by the name of that value.
    """

    graph: fx.Graph
    nodes: Mapping[str, fx.Node]


def nested_calls(call: TracedCall) -> Iterator[TracedCall]:
    """Yield a call and all calls below it, outer ones first."""
    yield call
    for step in call.steps:
        if isinstance(step, TracedCall):
            yield from nested_calls(step)


def nodes_below(call: TracedCall) -> Iterator[fx.Node]:
    """Yield the nodes that a call makes, with those of all calls below it."""
    for inner in nested_calls(call):
        yield from (step for step in inner.steps if isinstance(step, fx.Node))


def nodes_in(values: Any) -> list[fx.Node]:
    """Return the nodes in nested containers, in order."""
    if isinstance(values, fx.Node):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif isinstance(values, slice):
        values = (values.start, values.stop, values.step)
    elif not isinstance(values, (tuple, list)):
        return []
    return [node for value in values for node in nodes_in(value)]


def is_made_tensor(node: fx.Node) -> bool:
    """Whether a node reads a tensor that the program made while it was traced. `torch.fx` gives it this name."""
    return node.op == "get_attr" and str(node.target).rpartition(".")[2].startswith(MADE_TENSOR)


def produced_values(call: TracedCall, inlined: Collection[str] = ()) -> set[str]:
    """Return the names of the values that a module's own forward computes or gets from its children.

    The forwards of the `inlined` children count as parts of its own.
    """
    names: set[str] = set()
    for step in call.steps:
        if isinstance(step, fx.Node):
            names.add(step.name)
        else:
            names |= {node.name for node in nodes_in(step.result)}
            names |= produced_values(step, inlined) if step.path in inlined else set()
    return names - received_values(call)


def children_to_inline(call: TracedCall, regions: Sequence[Region], working: Collection[str]) -> set[str]:
    """Return the paths of the modules below a call whose forwards must become part of its graph to remove regions.

    A child is one of them if it computes a region's exit or stand-in without returning it, or if a part of it is
    removed and a part is not.

    Parameters
    ----------
    call : TracedCall
        The call whose module becomes a graph.
    regions : sequence of Region
        The regions to remove.
    working : collection of str
        Names of the nodes that compute a value.
    """
    found = set()
    for inner in nested_calls(call):
        below = {node.name for node in nodes_below(inner)}
        hidden = below - {node.name for node in nodes_in(inner.result)}
        for region in regions:
            some = below & set(region.nodes) & set(working)
            if {region.exit, region.stand_in} & hidden or (some and not below & set(working) <= set(region.nodes)):
                found.add(inner.path)
    return found - {call.path}


def received_values(call: TracedCall) -> set[str]:
    """Return the names of the values that a call receives as arguments."""
    return {node.name for node in nodes_in(call.args) + nodes_in(call.kwargs)}


def build_body(
    root: nn.Module,
    call: TracedCall,
    inlined: Collection[str] = (),
    constants: Mapping[str, Any] = MappingProxyType({}),
) -> Body:
    """Build the graph of one module's own forward.

    Parameters
    ----------
    root : Module
        The module that was traced.
    call : TracedCall
        A call of a module below it, or of itself.
    inlined : collection of str
        Paths of modules below it whose forwards become part of the graph. Other children are one node each.
    constants : mapping of str to object
        Arguments of `root` that are constants in the larger graph.

    Returns
    -------
    Body

    Raises
    ------
    BodyError
        If the forward reads a value that it neither receives nor computes, or takes or returns a container of a class
        that a graph cannot hold.
    """
    return _Builder(root, call, inlined, constants).build()


_STARS: Mapping[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class _Builder:
    def __init__(
        self, root: nn.Module, call: TracedCall, inlined: Collection[str], constants: Mapping[str, Any]
    ) -> None:
        self.root, self.call, self.inlined, self.constants = root, call, inlined, constants
        self.module = root.get_submodule(call.path)
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.paths = {id(part): path for path, part in reversed([*self.module.named_modules()])}
        self.passed_on: dict[int, dict[int | str, fx.Node]] = {}
        self.calls = 0

    def build(self) -> Body:
        if self.call.path == "":
            self._copy_placeholders()
        else:
            self._make_placeholders()
        self._add_steps(self.call)
        self.graph.output(self._translate(self.call.result))
        return Body(self.graph, self.nodes)

    def _copy_placeholders(self) -> None:
        for node in self.call.args:
            self.nodes[node.name] = self.graph.node_copy(node)
        self._check_constants(
            [
                (self.nodes[node.name], self.constants[node.target])
                for node in self.call.args
                if node.target in self.constants
            ]
        )

    def _make_placeholders(self) -> None:
        """Add a placeholder for each parameter of the forward, and check arguments that were constants."""
        signature = inspect.signature(self.module.forward)
        try:
            given = signature.bind(*self.call.args, **self.call.kwargs).arguments
        except TypeError as error:
            raise BodyError(str(error)) from None
        constants: list[tuple[fx.Node, Any]] = []
        for name, parameter in signature.parameters.items():
            value = given.get(name, parameter.default)
            stars = _STARS.get(parameter.kind, "")
            if stars and name in given:
                raise BodyError(f"its argument {name!r} collects several values")
            default = () if parameter.default is parameter.empty else (parameter.default,)
            node = self.graph.create_node("placeholder", stars + name, () if stars else default, {}, name)
            if nodes_in(value):
                self._bind(node, value)
            elif not stars:
                constants.append((node, value))
        self._check_constants(constants)

    def _check_constants(self, constants: Sequence[tuple[fx.Node, Any]]) -> None:
        """Check arguments that are constants in the graph. Those that are only passed on to children stay free."""
        absent = [str(node.target) for node, value in constants if value is None]
        steps = [step.path if isinstance(step, TracedCall) else _called_path(step) for step in self.call.steps]
        paths = [self._path_below(path, "call_module") for path in steps if path is not None]
        found = {} if self.inlined or not absent else passed_on_arguments(self.module, absent, paths)
        for node, value in constants:
            if value is None and node.target in found:
                for number, key in found[str(node.target)]:
                    self.passed_on.setdefault(number, {})[key] = node
            elif value is None or isinstance(value, (bool, int, float, str)):
                self.graph.call_function(check_constant, (node, value, str(node.target)))

    def _bind(self, node: fx.Node, value: Any) -> None:
        """Note which values a node of the new graph holds."""
        if isinstance(value, fx.Node):
            if self.nodes.setdefault(value.name, node) is not node:
                raise BodyError(f"it receives the value {value.name!r} twice")
            return
        _check_container(value)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if nodes_in(item):
                self._bind(self._item(node, key), item)

    def _item(self, node: fx.Node, key: Any) -> fx.Node:
        return self.graph.call_function(operator.getitem, (node, key))

    def _add_steps(self, call: TracedCall) -> None:
        for step in call.steps:
            if isinstance(step, fx.Node):
                self._copy_node(step)
            elif step.path in self.inlined:
                self._add_steps(step)
            else:
                self._add_call(step)

    def _copy_node(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "output"):
            return
        args, kwargs = self._translate(node.args), self._translate(node.kwargs)
        target = node.target
        if node.op in ("call_module", "get_attr") and not is_made_tensor(node):
            target = self._path_below(str(node.target), node.op)
        if node.op == "call_module":
            args, kwargs = self._pass_on(args, kwargs)
        new = self.graph.create_node(node.op, target, args, kwargs, node.name, node.type)
        new.meta = {key: value for key, value in node.meta.items() if key != "nn_module_stack"}
        self.nodes[node.name] = new

    def _path_below(self, path: str, op: str) -> str:
        """Return the path, below this body's module, of what a node of the larger graph reads."""
        if is_within(path, self.call.path) and path != self.call.path:
            return path[len(self.call.path) + 1 :] if self.call.path else path
        owner, _, leaf = (path, "", "") if op == "call_module" else path.rpartition(".")
        part = self.root.get_submodule(owner)
        if id(part) not in self.paths:
            raise BodyError(f"it reads {path!r}, which belongs to another module")
        return join_path(self.paths[id(part)], leaf)

    def _pass_on(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Put arguments that are only passed on into the next call of a child, in place of None."""
        places, self.calls = self.passed_on.get(self.calls, {}), self.calls + 1
        named = {key: node for key, node in places.items() if isinstance(key, str)}
        return tuple(places.get(number, value) for number, value in enumerate(args)), {**kwargs, **named}

    def _add_call(self, call: TracedCall) -> None:
        path = self._path_below(call.path, "call_module")
        results = nodes_in(call.result)
        name = results[0].name if isinstance(call.result, fx.Node) else None
        args, kwargs = self._translate(call.args), self._translate(call.kwargs)
        args, kwargs = self._pass_on(args, kwargs)
        node = self.graph.create_node("call_module", path, args, kwargs, name)
        self._bind_result(node, call.result, received_values(call))

    def _bind_result(self, node: fx.Node, value: Any, received: set[str]) -> None:
        if isinstance(value, fx.Node):
            if value.name not in received:  # a child may return its argument
                self.nodes[value.name] = node
            return
        if not nodes_in(value):
            return
        _check_container(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if nodes_in(item):
                self._bind_result(self._item(node, key), item, received)

    def _translate(self, value: Any) -> Any:
        """Replace the nodes of the larger graph in nested containers by those of this graph."""
        if isinstance(value, fx.Node):
            return self._latest(value)
        if isinstance(value, slice):
            return slice(*(self._translate(item) for item in (value.start, value.stop, value.step)))
        if not nodes_in(value):
            return value
        _check_container(value)
        if isinstance(value, dict):
            items = [(key, self._translate(item)) for key, item in value.items()]
            ordered = type(value) is OrderedDict
            return self.graph.call_function(OrderedDict, (items,)) if ordered else dict(items)
        return (tuple if isinstance(value, tuple) else list)(self._translate(item) for item in value)

    def _latest(self, node: fx.Node) -> fx.Node:
        constant = node.op == "get_attr" or (node.op == "call_function" and _depends_on_constants(node))
        if node.name not in self.nodes and constant:
            self._copy_node(node)
        if node.name not in self.nodes:
            raise BodyError(f"it reads the value {node.name!r}, which it neither receives nor computes")
        return self.nodes[node.name]


def _called_path(node: fx.Node) -> str | None:
    return str(node.target) if node.op == "call_module" else None


def _depends_on_constants(node: fx.Node) -> bool:
    return all(source.op == "get_attr" for source in node.all_input_nodes)


_CONTAINERS = (tuple, list, dict, OrderedDict, immutable_list, immutable_dict)


def _check_container(value: Any) -> None:
    if type(value) not in _CONTAINERS:
        raise BodyError(f"it passes on a {type(value).__name__}")
