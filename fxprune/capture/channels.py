"""Finds the number of channels of values, and the nodes that concatenate, split or convolve channels."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.module_trace import Traced, trace_module
from fxprune.capture.tracer import LEAF_MODULES
from fxprune.graph.fx_utils import class_names
from fxprune.graph.operators import ADDITIONS, is_activation, is_norm, static_length

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Layers that are linear in their weight. A subclass may not be linear: it may standardize its weight."""

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_POOLING = "torch.nn.modules.pooling."


def concatenated_values(node: fx.Node) -> list[fx.Node]:
    """Return the values that a node concatenates along the channels, in order; an empty list for any other node."""
    if node.target not in _CONCATENATIONS:
        return []
    options: dict[str, Any] = {**dict(zip(("tensors", "dim"), node.args, strict=False)), **node.kwargs}
    values = options.pop("tensors", ())
    fits = options == {"dim": 1} and isinstance(values, (list, tuple))
    return list(values) if fits and all(isinstance(value, fx.Node) for value in values) else []


def split_count(node: fx.Node) -> int | None:
    """Return the number of parts into which a node splits all channels of a value; None for any other node."""
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    return static_length(node) if dim == 1 and node.args and isinstance(node.args[0], fx.Node) else None


def channels_of(gm: fx.GraphModule) -> dict[str, int]:
    """Find the number of channels of each value from the layers of a graph.

    The graph is not run and no input shape is assumed. A value is left out if no convolution or norm determines its
    number of channels.

    Parameters
    ----------
    gm : GraphModule
        The graph; it is not changed.

    Returns
    -------
    dict of str to int
        Number of channels, by node name.

    Examples
    --------
    >>> channels_of(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())))
    {'_0': 8, '_1': 8}
    """
    found: dict[str, int] = {}
    for node in gm.graph.nodes:
        width = _layer_width(gm, node, found) if node.op == "call_module" else _function_width(gm, node, found)
        if width is not None:
            found[node.name] = width
    return found


def _layer_width(gm: fx.GraphModule, node: fx.Node, found: dict[str, int]) -> int | None:
    layer = gm.get_submodule(str(node.target))
    if isinstance(layer, CONVOLUTIONS):
        return int(layer.out_channels)  # type: ignore[arg-type]
    if isinstance(getattr(layer, "num_features", None), int):
        return int(layer.num_features)  # type: ignore[arg-type]
    keeps = is_norm(gm, node) or is_activation(gm, node) or class_names(layer)[0].startswith(_POOLING)
    if keeps and not isinstance(layer, nn.GLU):
        return _common_width(node, found)
    inside = trace_leaf(layer)
    if inside is None:
        return None
    (output,) = (inner for inner in inside.graph.nodes if inner.op == "output")
    return channels_of(inside).get(str(output.args[0]))


def _function_width(gm: fx.GraphModule, node: fx.Node, found: dict[str, int]) -> int | None:
    """Number of channels of the output of a function or a method; None if it is not known."""
    if node.op not in ("call_function", "call_method"):
        return None
    if values := concatenated_values(node):
        widths = [found.get(value.name) for value in values]
        return None if None in widths else sum(width for width in widths if width is not None)
    if node.target is operator.getitem:
        return _part_width(node, found)
    return _common_width(node, found) if node.target in ADDITIONS or is_activation(gm, node) else None


def _common_width(node: fx.Node, found: dict[str, int]) -> int | None:
    """Number of channels of all inputs of a node; None if they differ or are not known."""
    widths = {found.get(source.name) for source in node.all_input_nodes}
    return widths.pop() if len(widths) == 1 else None


def _part_width(node: fx.Node, found: dict[str, int]) -> int | None:
    split, index = node.args
    count = split_count(split) if isinstance(split, fx.Node) else None
    if count is None or not isinstance(index, int) or not isinstance(split, fx.Node):
        return None
    sizes = next(
        (value for value in (*split.args[1:2], *split.kwargs.values()) if isinstance(value, (list, tuple))), ()
    )
    if sizes:
        size = sizes[index]
        return size if isinstance(size, int) else None
    width = found.get(split.all_input_nodes[0].name)
    return width // count if width is not None and width % count == 0 else None


def trace_leaf(layer: nn.Module) -> fx.GraphModule | None:
    """Trace the inside of a leaf module, which is one node of its graph.

    Returns
    -------
    GraphModule or None
        None if the module is not in `LEAF_MODULES`, if its instance replaces `forward`, or if it cannot be traced.
    """
    if not any(name in LEAF_MODULES for name in class_names(layer)) or "forward" in vars(layer):
        return None
    traced = trace_module(layer, frozenset(), fixed_opaque=True)
    return traced.gm if isinstance(traced, Traced) else None


def input_convolutions(layer: nn.Module) -> list[str] | None:
    """Find the convolutions that read the single input of a layer.

    Returns
    -------
    list of str, or None
        Paths of these convolutions below the layer; ``[""]`` if the layer is a convolution itself. None if any other
        operation reads the input.

    Examples
    --------
    >>> input_convolutions(nn.Conv2d(3, 8, 1)), input_convolutions(nn.ReLU())
    ([''], None)
    """
    if type(layer) in CONVOLUTIONS:
        return [""]
    inside = trace_leaf(layer)
    if inside is None:
        return None
    taken, *others = [node for node in inside.graph.nodes if node.op == "placeholder"]
    fitting = [str(user.target) for user in taken.users if _is_convolution(inside, user, taken)]
    return fitting if fitting and not others and len(fitting) == len(taken.users) else None


def _is_convolution(gm: fx.GraphModule, node: fx.Node, value: fx.Node) -> bool:
    """Whether a node calls a convolution with one value and is the only call of that convolution."""
    if node.op != "call_module" or node.args != (value,) or node.kwargs:
        return False
    layer = gm.get_submodule(str(node.target))
    return type(layer) in CONVOLUTIONS and len(list(call_nodes(gm, layer))) == 1


def call_nodes(gm: fx.GraphModule, layer: nn.Module) -> Iterator[fx.Node]:
    """Yield the nodes of a graph that call a layer, under any of its paths."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and gm.get_submodule(str(node.target)) is layer:
            yield node
