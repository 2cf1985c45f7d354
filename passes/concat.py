"""Simplifies concatenations after a bypass: of the same value twice, or of all parts of one value."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.capture.channels import call_nodes, concatenated_values, input_convolutions, split_count
from fxprune.graph.fx_utils import join_path, tied_tensors
from fxprune.graph.operators import ADDITIONS

NARROWED_WEIGHTS = "fxprune_narrowed"
"""Key of a graph's meta: the path and the new shape of each weight that was narrowed."""


def deduplicate_concat(gm: fx.GraphModule, channels: Mapping[str, int], model: nn.Module | None = None) -> PassResult:
    """Replaces concatenations that hold a value twice by ones that hold it once, and their readers by narrower ones.

    A convolution is linear: equal input channels need only one weight, the sum of their weights. Exact except for the
    rounding of this sum. All readers must be convolutions that are called once, are not grouped and share no weight;
    otherwise the concatenation stays.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place; narrowed layers are copies. ``gm.meta[NARROWED_WEIGHTS]`` lists the narrowed weights.
    channels : mapping of str to int
        Number of channels of the values, by node name; see `fxprune.capture.channels.channels_of`.
    model : Module, optional
        The model that contains the graph. Weights shared with other parts of it stay.

    Returns
    -------
    PassResult
        `modified` is True if any reader became narrower.

    Examples
    --------
    >>> class Twice(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv = nn.Conv2d(6, 8, 1)
    ...     def forward(self, x):
    ...         return self.conv(torch.cat([x, x], 1))
    >>> gm = fx.symbolic_trace(Twice())
    >>> deduplicate_concat(gm, {"x": 3}).modified, gm.conv.in_channels
    (True, 3)
    """
    tied = tied_tensors(gm if model is None else model)
    narrowed: dict[str, tuple[int, ...]] = {}
    for node in gm.graph.nodes:
        values = [_as_multiple(value) for value in concatenated_values(node)]
        rests = list(dict.fromkeys(value for value, _ in values))
        widths = [channels.get(value.name, 0) for value, _ in values]
        if rests == concatenated_values(node) or not all(widths):
            continue
        readers = {user: _narrowable_convolutions(gm, user, node, sum(widths), tied) for user in node.users}
        if not all(readers.values()):
            continue
        for user, paths in readers.items():
            layer = copy.deepcopy(gm.get_submodule(str(user.target)))
            for path in paths:
                _narrow(layer.get_submodule(path), values, widths)
            gm.set_submodule(str(user.target), layer)
            keys = [join_path(str(user.target), path, "weight") for path in paths]
            narrowed |= {key: tuple(gm.get_parameter(key).shape) for key in keys}
        node.args, node.kwargs = (rests, 1), {}
    gm.meta[NARROWED_WEIGHTS] = narrowed
    gm.recompile()
    return PassResult(gm, bool(narrowed))


def collapse_split_concat(gm: fx.GraphModule, contiguous: Collection[str] = ()) -> PassResult:
    """Replaces the concatenation of all parts of a value, in order, by the value. Exact bit for bit.

    Only if all readers of the concatenation are convolutions, or if the value has the memory layout of the
    concatenation.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    contiguous : collection of str
        Names of values that are contiguous for reasons outside this graph, such as inputs.

    Returns
    -------
    PassResult
        `modified` is True if any concatenation was removed.

    Examples
    --------
    >>> class Split(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv = nn.Conv2d(6, 8, 1)
    ...     def forward(self, x):
    ...         first, second = x.split((2, 4), 1)
    ...         return self.conv(torch.cat([first, second], 1))
    >>> from fxprune.capture.tracer import FunctionalTracer
    >>> root = Split()
    >>> collapse_split_concat(fx.GraphModule(root, FunctionalTracer().trace(root))).modified
    True
    """
    modified = False
    for node in gm.graph.nodes:
        whole = _split_source(concatenated_values(node))
        if whole is not None and _is_replaceable(gm, node, whole, whole.name in contiguous):
            modified |= bool(node.replace_all_uses_with(whole))
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, modified)


def _as_multiple(node: fx.Node) -> tuple[fx.Node, int]:
    """Return a base value and the factor by which the node multiplies it: a value added to itself has factor 2."""
    factor = 1
    while node.target in ADDITIONS and node.args == (*node.all_input_nodes,) * 2 and not node.kwargs:
        factor, node = 2 * factor, node.all_input_nodes[0]
    return node, factor


def _narrowable_convolutions(
    gm: fx.GraphModule, user: fx.Node, value: fx.Node, width: int, tied: set[int]
) -> list[str]:
    """Return the paths, below the called layer, of the convolutions to narrow; empty if one cannot be narrowed."""
    if user.op != "call_module" or user.args != (value,) or user.kwargs:
        return []
    layer = gm.get_submodule(str(user.target))
    if len(list(call_nodes(gm, layer))) > 1 or any(id(tensor) in tied for tensor in _tensors(layer)):
        return []
    paths = input_convolutions(layer) or []
    fits = all(_is_narrowable(layer.get_submodule(path), width) for path in paths)
    return paths if fits else []


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _is_narrowable(convolution: Any, width: int) -> bool:
    """Whether a convolution is not grouped, has `width` input channels, and its weight is a plain parameter."""
    plain = type(dict(convolution.named_parameters(recurse=False)).get("weight")) is nn.Parameter
    return plain and bool(convolution.groups == 1 and convolution.in_channels == width)


def _narrow(convolution: nn.Module, values: Sequence[tuple[fx.Node, int]], widths: Sequence[int]) -> None:
    weight = convolution.get_parameter("weight")
    axis = 0 if convolution.transposed else 1
    precise = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    sums: dict[fx.Node, Tensor] = {}
    for (value, factor), part in zip(values, torch.split(precise, list(widths), axis), strict=True):
        part = part * factor if factor > 1 else part
        sums[value] = sums[value] + part if value in sums else part
    narrow = torch.cat(list(sums.values()), axis).to(weight.dtype)
    convolution.weight = nn.Parameter(narrow, weight.requires_grad)
    convolution.in_channels = narrow.shape[axis]  # type: ignore[assignment]


def _split_source(values: Sequence[fx.Node]) -> fx.Node | None:
    """Return the value that was split into exactly these parts, in order; None if there is no such value."""
    split = values[0].args[0] if values and values[0].target is operator.getitem else None
    if not isinstance(split, fx.Node) or split_count(split) != len(values):
        return None
    parts = [(operator.getitem, (split, index)) for index in range(len(values))]
    return split.all_input_nodes[0] if [(value.target, value.args) for value in values] == parts else None


def contiguous_values(gm: fx.GraphModule) -> set[str]:
    """Return the names of the values that the program itself makes contiguous.

    Examples
    --------
    >>> contiguous_values(fx.symbolic_trace(lambda x: x.contiguous().view(-1)))
    {'contiguous', 'view'}
    """
    return {node.name for node in gm.graph.nodes if _is_contiguous(node)}


def _is_contiguous(node: fx.Node) -> bool:
    while node.target == "view":
        node = node.all_input_nodes[0]
    return node.target == "contiguous" and len(node.args) == 1 and not node.kwargs


def _is_replaceable(gm: fx.GraphModule, node: fx.Node, value: fx.Node, contiguous: bool) -> bool:
    """Whether all readers of a concatenation compute the same from `value`."""
    layers = [gm.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
    if len(layers) == len(node.users) and all(input_convolutions(layer) for layer in layers):
        return True
    return (contiguous or _is_contiguous(value)) and not any(user.op == "output" for user in node.users)
