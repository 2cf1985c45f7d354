"""Classifies operations by tables: additions, norms, activations, in-place operations and their functional forms."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.graph.fx_utils import INPLACE_ORIGIN, class_names, qualified_name

ADDITIONS: frozenset[Any] = frozenset({operator.add, torch.add, "add"})
"""Targets of nodes that add two values."""

NORM_MODULES = (
    "torch.nn.modules.batchnorm.",
    "torch.nn.modules.normalization.",
    "torch.nn.modules.instancenorm.",
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
"""Prefixes of class names of norms: modules that rescale each channel of a layer's output."""

NEW_TENSOR_MODULES = ("torch.nn.modules.conv.", "torch.nn.modules.linear.Linear", *NORM_MODULES)
"""Prefixes of class names of modules whose output is a new tensor that their backward pass does not need."""

ACTIVATION_MODULES = ("torch.nn.modules.activation.", "torch.nn.modules.dropout.", "torch.nn.modules.linear.Identity")
"""Prefixes of class names of elementwise modules."""

NORM_FUNCTIONS = frozenset(
    map(qualified_name, (functional.batch_norm, functional.layer_norm, functional.group_norm, functional.instance_norm))
)
ACTIVATION_FUNCTIONS = frozenset(
    qualified_name(function)
    for function in (
        *(torch.relu, torch.sigmoid, torch.tanh, functional.relu, functional.relu6, functional.silu, functional.gelu),
        *(functional.hardswish, functional.hardsigmoid, functional.leaky_relu, functional.mish, functional.elu),
        *(functional.dropout, functional.softplus, functional.selu),
    )
) | {"relu", "sigmoid", "tanh", "contiguous"}


AUGMENTED_ASSIGNMENTS: dict[Any, Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod")
}
INPLACE_TO_FUNCTIONAL: dict[Any, Callable[..., Any]] = {
    **AUGMENTED_ASSIGNMENTS,
    **{
        getattr(home, name): getattr(home, name[:-1])
        for home in (torch, functional)
        for name in dir(home)
        if name.endswith("_") and not name.startswith("_") and hasattr(home, name[:-1])
    },
    torch.zero_: torch.zeros_like,
}
"""Each in-place function, with the function that computes the same into a new tensor. Includes `+=` and the like."""


def is_norm_layer(layer: nn.Module) -> bool:
    """Whether a module is a norm: it rescales each channel of a layer's output."""
    return class_names(layer)[0].startswith(NORM_MODULES)


def channel_dim(layer: nn.Module, value: Tensor) -> int:
    """Return the channel dimension of a module's input or output. The other dimensions are images and positions."""
    if isinstance(layer, (nn.Linear, nn.LayerNorm)):
        return value.ndim - 1
    return 1 if value.ndim > 3 or is_norm_layer(layer) else value.ndim - 1


def to_rows(layer: nn.Module, value: Tensor) -> Tensor:
    """Reshape a module's input or output to rows (n, C), one row per position."""
    rows = value.movedim(channel_dim(layer, value), -1)
    return rows.reshape(-1, rows.shape[-1])


def is_norm(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a norm. A norm belongs to the layer right before it."""
    if node.op == "call_module":
        return is_norm_layer(gm.get_submodule(str(node.target)))
    return qualified_name(node.target) in NORM_FUNCTIONS


def may_be_overwritten(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the reader of a node's value may overwrite it.

    The value must have one reader only and be a new tensor that no backward pass needs.
    """
    return len(node.users) == 1 and is_spare_tensor(gm, node)


def is_spare_tensor(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's value is a new tensor that no backward pass needs."""
    if node.op == "call_module":
        return class_names(gm.get_submodule(str(node.target)))[0].startswith(NEW_TENSOR_MODULES)
    called = node.op in ("call_function", "call_method")
    return called and (node.target in {*ADDITIONS, operator.iadd} or qualified_name(node.target) in NORM_FUNCTIONS)


def in_place_layers(gm: fx.GraphModule) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the path of each called layer with an `inplace` flag, the layer, and whether it may overwrite its input."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and hasattr(layer := gm.get_submodule(str(node.target)), "inplace"):
            yield str(node.target), layer, all(may_be_overwritten(gm, read) for read in node.all_input_nodes)


def in_place_functions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Any]]:
    """Yield each node for which the program calls an in-place function, and that function.

    Only nodes whose first argument may be overwritten, see `may_be_overwritten`.
    """
    for node in gm.graph.nodes:
        written, overwritten = node.meta.get(INPLACE_ORIGIN), node.args[0] if node.args else None
        if written is not None and isinstance(overwritten, fx.Node) and may_be_overwritten(gm, overwritten):
            yield node, written


def is_activation(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is elementwise (activation, dropout). It belongs to the node before it."""
    if node.op == "call_module":
        layer = gm.get_submodule(str(node.target))
        return class_names(layer)[0].startswith(ACTIVATION_MODULES) and not isinstance(layer, nn.MultiheadAttention)
    return qualified_name(node.target) in ACTIVATION_FUNCTIONS


def is_in_place(kind: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a function or a method overwrites its first argument."""
    if kind == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    return kind == "call_function" and (
        target in INPLACE_TO_FUNCTIONAL or _inplace_argument(target, args, kwargs) is not None
    )


def functional_form(
    kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return target, args and kwargs of the call that computes the same into a new tensor."""
    if kind == "call_method":
        functional = str(target).rstrip("_")
        if not hasattr(torch.Tensor, functional):
            raise fx.proxy.TraceError(f"Tensor.{target} overwrites a value and has no functional form")
        return functional, args, kwargs
    if kind == "call_function":
        flag = _inplace_argument(target, args, kwargs)
        if isinstance(flag, int):
            args = (*args[:flag], False, *args[flag + 1 :])
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        return INPLACE_TO_FUNCTIONAL.get(target, target), args, kwargs
    return target, args, kwargs


def _inplace_argument(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Return the position or the name of the argument ``inplace=True`` of a call; None without it."""
    if kwargs.get("inplace") is True:
        return "inplace"
    if not any(value is True for value in args):
        return None
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a built-in function has no signature, and no such flag
        return None
    position = names.index("inplace") if "inplace" in names else len(args)
    return position if position < len(args) and args[position] is True else None


_STATIC_LENGTHS: dict[str, Callable[..., int | None]] = {
    "chunk": lambda chunks=None, *_: chunks if isinstance(chunks, int) else None,
    "split": lambda sizes=None, *_: len(sizes) if isinstance(sizes, (list, tuple)) else None,
    "tensor_split": lambda parts=None, *_: parts if isinstance(parts, int) else None,
}


def static_length(node: fx.Node) -> int | None:
    """Return the number of values of a node if the program fixes it (`chunk(2, 1)`, `split((a, b), 1)`), else None."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    rule = _STATIC_LENGTHS.get(str(name))
    if rule is None or node.op not in ("call_method", "call_function"):
        return None
    named = {"chunks": "chunks", "split_size": "sizes", "split_size_or_sections": "sizes"}
    options = {named[key]: value for key, value in node.kwargs.items() if key in named}
    return rule(*node.args[1:], **options)
