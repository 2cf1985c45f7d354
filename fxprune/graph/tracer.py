"""Traces a module to a functional graph: no in-place operation, static lengths resolved, known leaf modules kept."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.fx_utils import INPLACE_ORIGIN, class_names
from fxprune.graph.operators import AUGMENTED_ASSIGNMENTS, INPLACE_TO_FUNCTIONAL, functional_form, is_in_place
from fxprune.runtime.contexts import context_states, watch_autocasts
from fxprune.runtime.signals import defer_interrupts
from fxprune.runtime.torch_internals import tree_map_only

LEAF_MODULES: dict[str, str] = {
    "torchvision.ops.misc.FrozenBatchNorm2d": "one normalization, not seven arithmetic nodes",
    "torchvision.ops.stochastic_depth.StochasticDepth": "reads self.training",
    "timm.layers.drop.DropPath": "reads self.training",
    "ultralytics.nn.modules.conv.Conv": "fuse() looks for instances of it and folds its norm",
}
"""Modules that stay one node, by qualified class name (subclasses included), and the reason for each."""

_STATIC_LENGTHS: dict[str, Callable[..., int | None]] = {
    "chunk": lambda chunks=None, *_: chunks if isinstance(chunks, int) else None,
    "split": lambda sizes=None, *_: len(sizes) if isinstance(sizes, (list, tuple)) else None,
    "tensor_split": lambda parts=None, *_: parts if isinstance(parts, int) else None,
}


class StaticLengthProxy(fx.Proxy):
    """A proxy that supports `len` if the program fixes the number of values."""

    def __len__(self) -> int:
        length = static_length(self.node)
        return super().__len__() if length is None else length


def static_length(node: fx.Node) -> int | None:
    """Return the number of values of a node if the program fixes it (`chunk(2, 1)`, `split((a, b), 1)`), else None."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    rule = _STATIC_LENGTHS.get(str(name))
    if rule is None or node.op not in ("call_method", "call_function"):
        return None
    named = {"chunks": "chunks", "split_size": "sizes", "split_size_or_sections": "sizes"}
    options = {named[key]: value for key, value in node.kwargs.items() if key in named}
    return rule(*node.args[1:], **options)


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


class Refusal(fx.proxy.TraceError):
    """A module is not traced, though it could be. The message is a predicate: ``"enters torch.no_grad"``."""


class FunctionalTracer(fx.Tracer):
    """Trace a module to a functional graph.

    In-place operations become their functional forms. Later readers of an overwritten value read the new value. So the
    graph computes the same as the module and overwrites no value. A forward that enters a context such as
    `torch.no_grad` or `torch.autocast` is refused: a graph has no contexts.

    Parameters
    ----------
    opaque : collection of str
        Dotted paths, relative to the root, of modules that stay one node because their inside cannot be traced.

    Attributes
    ----------
    failed_module : str or None
        Path of the innermost module whose forward raised while it was traced; "" is the root.
    owners : dict
        Path of the module whose forward created the node, by node name.
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

    def __init__(self, opaque: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.opaque = opaque
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
        with defer_interrupts(), torch.inference_mode(False), torch.enable_grad(), watch_autocasts() as self._autocasts:
            self._entry_states = [context_states(self._autocasts)]
            return super().trace(root, concrete_args)

    def _refuse_contexts(self) -> None:
        """Raise `Refusal` if the module that is being traced has entered a context."""
        states = context_states(self._autocasts)
        changed = [name for name, state in self._entry_states[-1].items() if states[name] != state]
        if changed:
            raise Refusal(f"enters {changed[0]}")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node: opaque, in `LEAF_MODULES`, or a layer of torch.nn itself."""
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
        """Iterate over a value whose length the program fixes."""
        length = static_length(obj.node)
        return super().iter(obj) if length is None else iter([operator.getitem(obj, i) for i in range(length)])

    def create_arg(self, a: Any) -> Any:
        """Convert an argument to a graph argument; an OrderedDict stays an OrderedDict."""
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
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "call_function" and written in INPLACE_TO_FUNCTIONAL:
            node.meta[INPLACE_ORIGIN] = written
        self.owners[node.name] = self._active[-1].path
        self._active[-1].steps.append(node)
        overwritten = args[0] if args else kwargs.get("input")
        if overwrites and isinstance(overwritten, fx.Node):
            self._overwritten[overwritten] = node
        return node

    def _latest_value(self, node: fx.Node) -> fx.Node:
        while node in self._overwritten:
            node = self._overwritten[node]
        return node

    def _is_in_place(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if kind == "call_module":
            return bool(getattr(self.root.get_submodule(target), "inplace", False)) and target not in self.opaque
        return is_in_place(kind, target, args, kwargs)
