"""Folds batch norms into the convolutions before them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fxprune.capture.channels import CONVOLUTIONS, call_nodes
from fxprune.graph.fx_utils import class_names
from fxprune.passes.dead_code import remove_dead_code
from fxprune.runtime.torch_internals import has_forward_hooks

FROZEN_BATCHNORM = "torchvision.ops.misc.FrozenBatchNorm2d"
"""Class name of a norm that training does not change."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_batchnorm(gm: fx.GraphModule) -> PassResult:
    """Replaces a convolution and the batch norm that reads it by one convolution. Exact except for rounding.

    Folds only norms in eval mode or with fixed statistics. The convolution must be called once, and the norm must be
    its only reader.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place; the folded convolutions are copies.

    Returns
    -------
    PassResult
        `modified` is True if any norm was folded.

    Examples
    --------
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval())
    >>> fold_batchnorm(gm).modified, list(gm.state_dict())
    (True, ['0.weight', '0.bias'])
    """
    pairs = list(foldable_pairs(gm))
    for convolution, norm in pairs:
        layers = [gm.get_submodule(str(node.target)) for node in (convolution, norm)]
        gm.set_submodule(str(convolution.target), folded_convolution(*layers))
        norm.replace_all_uses_with(convolution)
    if pairs:
        remove_dead_code(gm)
    return PassResult(gm, bool(pairs))


def foldable_pairs(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield pairs of nodes: a convolution, and the norm that can be folded into it."""
    for node in gm.graph.nodes:
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or {node.op, reader.op} != {"call_module"} or reader.args != (node,) or reader.kwargs:
            continue
        convolution, norm = (gm.get_submodule(str(found.target)) for found in (node, reader))
        if _is_foldable(convolution) and _is_fixed_norm(norm) and len(list(call_nodes(gm, convolution))) == 1:
            yield node, reader


def folded_convolution(convolution: nn.Module, norm: nn.Module) -> nn.Module:
    """Return one convolution that replaces a convolution and a norm. Its weights are computed in float32 at least."""
    weight = convolution.get_parameter("weight")
    precise = torch.promote_types(weight.dtype, torch.float32)
    first, second = (_copy_layer(layer).to(precise).eval() for layer in (convolution, norm))
    with torch.no_grad():
        both: nn.Module = fuse_conv_bn_eval(first, second, transpose=first.transposed).to(weight.dtype)
    both.training = convolution.training
    return both.requires_grad_(weight.requires_grad)


def _copy_layer(layer: nn.Module) -> Any:
    return copy.deepcopy(layer)


def _is_foldable(layer: Any) -> bool:
    plain = type(dict(layer.named_parameters(recurse=False)).get("weight")) is nn.Parameter
    if type(layer) not in CONVOLUTIONS or not plain:
        return False
    return not (layer.transposed and layer.groups > 1) and not has_forward_hooks(layer)


def _is_fixed_norm(layer: Any) -> bool:
    """Whether a layer is a norm whose statistics are the same in every call."""
    if has_forward_hooks(layer):
        return False
    return class_names(layer)[0] == FROZEN_BATCHNORM or (
        type(layer) in _NORMS and not layer.training and layer.running_mean is not None
    )
