"""Removes operations whose output equals their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional

from fxprune.graph.fx_utils import class_names
from fxprune.runtime.torch_internals import has_backward_hooks, has_forward_hooks

IDENTITY_MODULES: Mapping[str, Callable[[Any], bool]] = {
    "torch.nn.modules.linear.Identity": lambda layer: True,
    **{f"torch.nn.modules.dropout.Dropout{rank}": lambda layer: layer.p == 0 for rank in ("", "1d", "2d", "3d")},
    "torchvision.ops.stochastic_depth.StochasticDepth": lambda layer: layer.p == 0,
    "timm.layers.drop.DropPath": lambda layer: not layer.drop_prob,
}
"""By class name: whether the output of a layer equals its input, in train mode and in eval mode."""

_ABOVE_ZERO, _TO_SIX = (0.0, float("inf")), (0.0, 6.0)
_CLAMPS: Mapping[Any, Callable[..., tuple[float, float]]] = {
    nn.ReLU: lambda layer: _ABOVE_ZERO,
    nn.ReLU6: lambda layer: _TO_SIX,
    nn.Hardtanh: lambda layer: (layer.min_val, layer.max_val),
    **dict.fromkeys((functional.relu, torch.relu, "relu"), lambda x, inplace=False: _ABOVE_ZERO),
    functional.relu6: lambda x, inplace=False: _TO_SIX,
    functional.hardtanh: lambda x, min_val=-1.0, max_val=1.0, inplace=False: (min_val, max_val),
}
"""Operations that only clamp values to a range, each with a function that returns the range."""


def remove_identity_ops(gm: fx.GraphModule) -> PassResult:
    """Replaces operations whose output equals their input, in train mode and in eval mode, by their input.

    These are the layers in `IDENTITY_MODULES` and, of two successive clamps such as ``relu(relu6(x))``, the clamp with
    the wider range. Operations that the output reads and layers with hooks stay.

    Parameters
    ----------
    gm : GraphModule
        Functional; rewritten in place.

    Returns
    -------
    PassResult
        `modified` is True if any operation was removed.

    Examples
    --------
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Conv2d(3, 8, 1)))
    >>> remove_identity_ops(gm).modified
    True
    """
    modified = False
    for node in gm.graph.nodes:
        if len(node.all_input_nodes) != 1 or _has_hooks(gm, node):
            continue
        (source,) = node.all_input_nodes
        own, before = _clamp(gm, node), _clamp(gm, source)
        seen = any(user.op == "output" for user in node.users)
        if not seen and (_is_identity(gm, node) or (own and before and _contains(own, before))):
            modified |= bool(node.replace_all_uses_with(source))
        elif own and before and _contains(before, own) and len(source.users) == 1 and not _has_hooks(gm, source):
            node.replace_input_with(source, source.all_input_nodes[0])
            modified = True
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, modified)


def _has_hooks(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    layer = gm.get_submodule(str(node.target))
    return has_forward_hooks(layer) or has_backward_hooks(layer)


def _is_identity(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return False
    layer = gm.get_submodule(str(node.target))
    return IDENTITY_MODULES.get(class_names(layer)[0], lambda layer: False)(layer)


def _clamp(gm: fx.GraphModule, node: fx.Node) -> tuple[float, float] | None:
    """Return the range to which a node clamps values, or None if it is no plain clamp."""
    if len(node.all_input_nodes) != 1 or not node.args:
        return None
    if node.op == "call_module":
        layer = gm.get_submodule(str(node.target))
        return _CLAMPS[type(layer)](layer) if type(layer) in _CLAMPS else None
    return _CLAMPS[node.target](*node.args, **node.kwargs) if node.target in _CLAMPS else None


def _contains(wide: tuple[float, float], narrow: tuple[float, float]) -> bool:
    return wide[0] <= narrow[0] and narrow[1] <= wide[1]
