"""Classifies operations by tables: additions, norms, activations, operations that may run in place."""

from __future__ import annotations

import operator
from collections.abc import Iterator
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
    if len(node.users) != 1:
        return False
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
