"""What a bypass leaves behind where values are concatenated: one value twice, and a value in its own parts."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.channels import calls_of, convolutions_reading, joined, parts_of
from fxprune.graph import dotted, tied_tensors
from fxprune.operations import ADDITIONS

NARROWED = "fxprune_narrowed"
"""Key of a graph's meta: weights that were narrowed, by path, and their shapes since."""


def narrow_readers(gm: fx.GraphModule, channels: Mapping[str, int], model: nn.Module | None = None) -> PassResult:
    """Replaces concatenations that hold a value twice by ones that hold it once, their readers by narrower ones.

    A convolution is linear: of channels that are the same, it needs the sum of their weights. Exact but for the
    rounding of that sum. Left alone is a concatenation that anything but such convolutions reads: ones that are called
    once, are not grouped, and share no weight.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place; the layers that become narrower are copies. ``gm.meta[NARROWED]`` says which these are.
    channels : mapping of str to int
        How many channels the values have, by node name; see `fxprune.channels.channels_of`.
    model : Module, optional
        What the graph is a part of; weights shared with other parts of it are left alone.

    Returns
    -------
    PassResult
        `modified` says whether any reader became narrower.
    """
    tied = tied_tensors(gm if model is None else model)
    narrowed: dict[str, tuple[int, ...]] = {}
    for node in gm.graph.nodes:
        values = [_multiple(value) for value in joined(node)]
        rests = list(dict.fromkeys(value for value, _ in values))
        widths = [channels.get(value.name, 0) for value, _ in values]
        if rests == joined(node) or not all(widths):
            continue
        readers = {user: _weights(gm, user, node, sum(widths), tied) for user in node.users}
        if not all(readers.values()):
            continue
        for user, paths in readers.items():
            layer = copy.deepcopy(gm.get_submodule(str(user.target)))
            for path in paths:
                _narrow(layer.get_submodule(path), values, widths)
            gm.set_submodule(str(user.target), layer)
            keys = [dotted(str(user.target), path, "weight") for path in paths]
            narrowed |= {key: tuple(gm.get_parameter(key).shape) for key in keys}
        node.args, node.kwargs = (rests, 1), {}
    gm.meta[NARROWED] = narrowed
    gm.recompile()
    return PassResult(gm, bool(narrowed))


def join_parts(gm: fx.GraphModule) -> PassResult:
    """Replaces all parts of a value, concatenated in their order, by the value. Exact bit for bit.

    Where nothing else is concatenated, the value stands in for the concatenation, if convolutions alone read that, or
    if the value lies in memory as the concatenation would.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.

    Returns
    -------
    PassResult
        `modified` says whether any concatenation changed.
    """
    modified = False
    for node in gm.graph.nodes:
        values = joined(node)
        whole = [value for source, run in groupby(values, _source) for value in _merged(source, list(run))]
        if len(whole) == len(values):
            continue
        if len(whole) == 1 and not _may_go(gm, node, whole[0]):
            continue
        if len(whole) == 1:
            node.replace_all_uses_with(whole[0])
        node.args, node.kwargs = (whole, 1), {}
        modified = True
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, modified)


def _multiple(node: fx.Node) -> tuple[fx.Node, int]:
    """What a value is a multiple of, and how many times it is that: a value added to itself is twice that value."""
    factor = 1
    while node.target in ADDITIONS and node.args == (*node.all_input_nodes,) * 2 and not node.kwargs:
        factor, node = 2 * factor, node.all_input_nodes[0]
    return node, factor


def _weights(gm: fx.GraphModule, user: fx.Node, value: fx.Node, width: int, tied: set[int]) -> list[str]:
    """Paths below the layer that a node calls of the convolutions to narrow; empty if it cannot be narrowed."""
    if user.op != "call_module" or user.args != (value,) or user.kwargs:
        return []
    layer = gm.get_submodule(str(user.target))
    if len(list(calls_of(gm, layer))) > 1 or any(id(tensor) in tied for tensor in _tensors(layer)):
        return []
    paths = convolutions_reading(layer) or []
    fits = all(_is_plain(layer.get_submodule(path), width) for path in paths)
    return paths if fits else []


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _is_plain(convolution: Any, width: int) -> bool:
    """Whether a convolution reads all of so many channels for every one that it gives, by a weight of its own."""
    plain = type(convolution._parameters.get("weight")) is nn.Parameter
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


def _source(node: fx.Node) -> fx.Node | None:
    """What takes a value apart, if a value is a part of another one."""
    part = node.target is operator.getitem and isinstance(node.args[1], int)
    split = node.args[0] if part else None
    return split if isinstance(split, fx.Node) and parts_of(split) is not None else None


def _merged(split: fx.Node | None, run: list[fx.Node]) -> list[fx.Node]:
    """Parts of one value that are concatenated one after the other; the value itself wherever all of them are there."""
    count = None if split is None else parts_of(split)
    merged: list[fx.Node] = []
    while run:
        if split is not None and [part.args[1] for part in run[:count]] == list(range(count or 0)):
            merged, run = [*merged, split.all_input_nodes[0]], run[count:]
        else:
            merged, run = [*merged, run[0]], run[1:]
    return merged


def _is_contiguous(node: fx.Node) -> bool:
    """Whether a value lies in memory in the order of its axes, as the program itself says."""
    while node.target == "view":
        node = node.all_input_nodes[0]
    return node.target == "contiguous" and len(node.args) == 1 and not node.kwargs


def _may_go(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether no reader of a concatenation can tell it from an equal value, however that lies in memory."""
    layers = [gm.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
    if len(layers) == len(node.users) and all(convolutions_reading(layer) for layer in layers):
        return True
    return _is_contiguous(value) and not any(user.op == "output" for user in node.users)
