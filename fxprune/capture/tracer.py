"""Traces a module to a functional graph: no in-place operation, static lengths resolved, known leaf modules kept."""

from __future__ import annotations

import dis
import inspect
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.contexts import context_states, watch_autocasts
from fxprune.capture.traced_sizes import StarredSize, decided_condition, is_shape, join_starred, star_shape
from fxprune.graph.fx_utils import INPLACE_ORIGIN, OVERWRITES, class_names, join_path
from fxprune.graph.operators import (
    AUGMENTED_ASSIGNMENTS,
    INPLACE_TO_FUNCTIONAL,
    functional_form,
    is_in_place,
    static_length,
)
from fxprune.graph.records import Refusal
from fxprune.runtime.signals import defer_interrupts
from fxprune.runtime.torch_internals import tree_map_only

LEAF_MODULES: dict[str, str] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": "one normalization, not seven arithmetic nodes",
    "torchvision.ops.stochastic_depth.StochasticDepth": "reads self.training",
    "timm.layers.drop.DropPath": "reads self.training",
    "ultralytics.nn.modules.conv.Conv": "fuse() looks for instances of it and folds its norm",
}
"""Modules that stay one node, by qualified class name (subclasses included), and the reason for each."""


class StaticLengthProxy(fx.Proxy):
    """A proxy that supports `len` if the program fixes the number of values."""

    def __len__(self) -> int:
        length = static_length(self.node)
        if length is None:  # a TypeError: Python asks values after a star for their length, and then does without
            raise TypeError(f"the number of values of {self.node.name!r} is not known while the module is traced")
        return length

    def __getattr__(self, k: str) -> StaticLengthAttribute:
        return StaticLengthAttribute(self, k)


class StaticLengthAttribute(fx.proxy.Attribute, StaticLengthProxy):
    """An attribute of a `StaticLengthProxy`, such as its shape."""


def _make_augmented_assignment(written: Callable[..., Any]) -> Callable[..., Any]:
    """Make an augmented assignment. It creates a new value, as in `torch.fx`, and records the in-place operator."""

    def assign(self: StaticLengthProxy, other: Any) -> Any:
        result = INPLACE_TO_FUNCTIONAL[written](self, other)
        if isinstance(result, fx.Proxy):
            result.node.meta[INPLACE_ORIGIN] = written
        return result

    return assign


for _written in AUGMENTED_ASSIGNMENTS:
    setattr(StaticLengthProxy, f"__{_written.__name__}__", _make_augmented_assignment(_written))


TRACED_CALL = "fxprune_call"
"""Key of a captured graph's meta: the `TracedCall` of the module."""
_SIZE_METHODS = frozenset({"view", "reshape", "expand", "repeat", "tile", "new_zeros", "new_ones", "new_empty"})
"""Methods whose positional arguments are a size: ``x.view(2, 3)`` is ``x.view((2, 3))``."""


@dataclass
class TracedCall:
    """One call of a module whose forward was traced.

    Attributes
    ----------
    path : str
        Path of the module below the traced one; "" is the traced module itself.
    args, kwargs
        Its arguments, with graph nodes in place of tensors.
    steps : list
        What its forward does, in order: the nodes that it makes itself, and the `TracedCall` of each module it calls.
    result
        What it returns, with graph nodes in place of tensors.
    """

    path: str
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    steps: list[fx.Node | TracedCall] = field(default_factory=list)
    result: Any = None

    def remove_steps(self, nodes: Collection[fx.Node]) -> None:
        """Remove nodes from the steps of this call and of all calls below it."""
        self.steps = [step for step in self.steps if isinstance(step, TracedCall) or step not in nodes]
        for step in self.steps:
            if isinstance(step, TracedCall):
                step.remove_steps(nodes)


ArgumentPath = tuple[int | str, ...]
"""Where a value is among a node's arguments: 0 (args) or 1 (kwargs), then positions and names."""
Switches = Mapping[int, Mapping[ArgumentPath, tuple[Any, Any]]]
"""Arguments that depend on the mode: by the ordinal of the node and their path, the values in eval and train mode."""


class FunctionalTracer(fx.Tracer):
    """Trace a module to a functional graph.

    In-place operations become their functional forms. Later readers of an overwritten value read the new value. So the
    graph computes the same as the module and overwrites no value. A forward that enters a context such as
    `torch.no_grad` or `torch.autocast` is refused: a graph has no contexts.

    Parameters
    ----------
    opaque : collection of str
        Dotted paths, relative to the root, of modules that stay one node because their inside cannot be traced.
    constants : mapping of str to object
        Values of arguments that are constants in the trace, see `fxprune.capture.module_trace.constant_arguments`.
    switches : Switches
        Arguments of nodes that are read from the mode of the module whose forward creates the node.
    identities : collection of str
        Paths of modules that return an argument. Their output is that argument, not a new value.

    Attributes
    ----------
    failed_module : str or None
        Path of the innermost module whose forward raised while it was traced; "" is the root.
    owners : dict
        Path of the module whose forward created the node, by node name.
    ordinals : dict
        Which node of the program it is, from 0, by node name. Nodes that read a mode have no entry.
    traced_modules : dict
        Paths of all modules that were traced into, in order.
    call : TracedCall
        What the traced module did, with all calls below it.

    Examples
    --------
    >>> class AddInPlace(nn.Module):
    ...     def forward(self, x):
    ...         x += 1
    ...         return x
    >>> [node.target for node in FunctionalTracer().trace(AddInPlace()).nodes][1]
    <built-in function add>
    """

    def __init__(
        self,
        opaque: frozenset[str] = frozenset(),
        constants: Mapping[str, Any] = MappingProxyType({}),
        switches: Switches = MappingProxyType({}),
        identities: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.opaque, self.constants, self.switches, self.identities = opaque, constants, switches, identities
        self.ordinals: dict[str, int] = {}
        self._decided: list[fx.Node] = []
        self.failed_module: str | None = None
        self.owners: dict[str, str] = {}
        self.traced_modules: dict[str, None] = {}
        self.call = TracedCall("")
        self._active = [self.call]
        self._entry_states: list[dict[str, Any]] = []
        self._autocasts: list[torch.autocast] = []
        self._overwritten: dict[fx.Node, fx.Node] = {}

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module as it runs with gradients; Ctrl-C takes effect after the trace."""
        contexts = (defer_interrupts(), torch.inference_mode(False), torch.enable_grad(), _without_hook_warnings())
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            self._autocasts = stack.enter_context(watch_autocasts())
            self._entry_states = [context_states(self._autocasts)]
            graph = super().trace(root, concrete_args)
            self._leave_out_decided()
        self.call.args = tuple(node for node in graph.nodes if node.op == "placeholder")
        self.call.result = graph.output_node().args[0]
        return graph

    def _refuse_contexts(self) -> None:
        """Raise `Refusal` if the module that is being traced has entered a context."""
        states = context_states(self._autocasts)
        changed = [name for name, state in self._entry_states[-1].items() if states[name] != state]
        if changed:
            raise Refusal(f"enters {changed[0]}")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node: opaque, in `LEAF_MODULES`, or a layer of torch.nn itself."""
        if module_qualified_name in self.identities:
            return False
        if module_qualified_name in self.opaque or any(name in LEAF_MODULES for name in class_names(m)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace a module call. If its forward raises, record the path of the module."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._refuse_contexts()
        self.traced_modules[path] = None
        call = TracedCall(path, self._nodes_of(args), self._nodes_of(kwargs))
        self._active[-1].steps.append(call)
        self._active.append(call)
        self._entry_states.append(context_states(self._autocasts))
        try:
            result = super().call_module(m, forward, args, kwargs)
            call.result = self._nodes_of(result)
            return result
        except Exception:
            self.failed_module = path if self.failed_module is None else self.failed_module
            raise
        finally:
            self._active.pop()
            self._entry_states.pop()

    def _nodes_of(self, values: Any) -> Any:
        """Replace each proxy in nested containers by the node that holds its latest value."""
        return tree_map_only(fx.Proxy, lambda proxy: self._latest_value(proxy.node), values)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node in a proxy that supports `len`."""
        return StaticLengthProxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a value whose length the program fixes, or over a starred shape."""
        length = static_length(obj.node)
        if length is not None:
            return iter([operator.getitem(obj, i) for i in range(length)])
        frame = inspect.currentframe()
        caller = frame.f_back.f_back if frame and frame.f_back else None  # above `Proxy.__iter__`
        if is_shape(obj.node) and caller is not None and _instruction(caller) == "LIST_EXTEND":
            return star_shape(obj)
        return super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide some conditions of which the result is as good as known; see `decided_condition`."""
        decided = decided_condition(obj.node, self.root.get_submodule(self._active[-1].path).training)
        if decided is None:
            return super().to_bool(obj)
        self._decided.append(obj.node)
        return decided

    def _leave_out_decided(self) -> None:
        """Leave out the conditions that were decided, and what was computed for them only."""
        waiting, found = list(self._decided), set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node.op in ("call_function", "call_method") and node not in found:
                found.add(node)
                waiting += node.all_input_nodes
        if found:
            self.graph.eliminate_dead_code(is_impure_node=lambda node: node not in found)
            self.call.remove_steps(found - set(self.graph.nodes))

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *more: Any,
        **options: Any,
    ) -> Any:
        """Add a node. A method takes a starred shape as one size."""
        if any(isinstance(value, StarredSize) for value in args):
            if kind != "call_method" or target not in _SIZE_METHODS:
                raise Refusal(f"calls {getattr(target, '__name__', target)!r} with a starred shape")
            args = (args[0], args[1:])
        return super().create_proxy(kind, target, args, kwargs, *more, **options)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Create the placeholders; return a function and its arguments, with constants in place of their proxies."""
        inner = inspect.unwrap(root_fn)
        function, values = super().create_args_for_root(inner, is_module, concrete_args)
        if concrete_args is not None:
            return function, values
        spec = inspect.getfullargspec(inner)
        names = [*spec.args, *spec.kwonlyargs, *(f"*{spec.varargs}" for _ in "1" if spec.varargs)]
        collected = {name: value for name, value in self.constants.items() if name not in names}
        bound = [self.constants.get(name, value) for name, value in zip(names, values, strict=False)]
        bound += [collected] * bool(spec.varkw)
        if inner is root_fn:
            return function, bound
        count = len(spec.args)
        rest = bound[count + len(spec.kwonlyargs)] if spec.varargs else ()
        if isinstance(rest, fx.Proxy):
            raise Refusal("is decorated and takes any number of arguments")
        named = dict(zip(spec.kwonlyargs, bound[count:], strict=False)) | (collected if spec.varkw else {})
        return (lambda: root_fn(*bound[:count], *rest, **named)), []

    def create_arg(self, a: Any) -> Any:
        """Convert an argument to a graph argument; an OrderedDict stays an OrderedDict."""
        if type(a) in (tuple, list) and any(isinstance(value, StarredSize) for value in a):
            return super().create_arg(join_starred(a))
        if isinstance(a, OrderedDict) and type(a) is OrderedDict:
            return self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}).node
        if isinstance(a, dict) and type(a) not in (dict, fx.immutable_collections.immutable_dict):
            raise fx.proxy.TraceError(f"a {type(a).__name__} is built inside the module")
        return super().create_arg(a)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Add a node in functional form."""
        self._refuse_contexts()
        args = fx.map_arg(args, lambda node: self._latest_value(node))
        kwargs = fx.map_arg(kwargs, lambda node: self._latest_value(node))
        overwrites = kind != "placeholder" and self._is_in_place(kind, target, args, kwargs)
        written = target
        if overwrites:
            target, args, kwargs = functional_form(kind, target, args, kwargs)
        ordinal = len(self.ordinals)
        for path, values in self.switches.get(ordinal, {}).items():
            args, kwargs = _replace_at((args, kwargs), path, self._make_switch(*values))
        node = self._add_node(kind, target, args, kwargs, name, type_expr)
        self.ordinals[node.name] = ordinal
        if overwrites and kind != "call_module":
            node.meta[OVERWRITES] = True
        if kind == "call_function" and written in INPLACE_TO_FUNCTIONAL:
            node.meta[INPLACE_ORIGIN] = written
        overwritten = args[0] if args else kwargs.get("input")
        if overwrites and isinstance(overwritten, fx.Node):
            self._overwritten[overwritten] = node
        return node

    def _add_node(self, *parts: Any) -> fx.Node:
        node = super().create_node(*parts)
        self.owners[node.name] = self._active[-1].path
        self._active[-1].steps.append(node)
        return node

    def _make_switch(self, in_eval: Any, in_train: Any) -> fx.Node:
        """Add nodes that read the mode of the module that is being traced, and choose between two values by it."""
        mode = self._add_node("get_attr", join_path(self._active[-1].path, "training"), (), {})
        if in_eval is False and in_train is True:
            return mode
        return self._add_node("call_function", operator.getitem, ((in_eval, in_train), mode), {})

    def _latest_value(self, node: fx.Node) -> fx.Node:
        while node in self._overwritten:
            node = self._overwritten[node]
        return node

    def _is_in_place(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kind == "call_module":
            return bool(getattr(self.root.get_submodule(target), "inplace", False)) and target not in self.opaque
        return is_in_place(kind, target, args, kwargs)


@contextmanager
def _without_hook_warnings() -> Iterator[None]:
    """Silence a warning of torch: modules with backward hooks return proxies while they are traced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="For backward hooks to be called")
        yield


def _replace_at(values: Any, path: ArgumentPath, new: Any) -> Any:
    """Return nested arguments with another value at a path."""
    if not path:
        return new
    key, *rest = path
    if isinstance(values, dict):
        return {**values, key: _replace_at(values[key], tuple(rest), new)}
    changed = list(values)
    changed[int(key)] = _replace_at(changed[int(key)], tuple(rest), new)
    return type(values)(changed)


def _instruction(frame: FrameType) -> str:
    """Return the name of the bytecode instruction that a frame executes."""
    found = (step.opname for step in dis.get_instructions(frame.f_code) if step.offset == frame.f_lasti)
    return next(found, "")
