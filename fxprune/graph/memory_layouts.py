"""Compares the memory layout of values with that of their stand-ins.

Values of equal shapes can lie in memory in different orders. A linear layer, for example, makes the permuted value that
it reads contiguous, and a `view` after it needs that. Where the layouts differ, the values that depend on them are
computed again. Where they do not work with the stand-in as it lies in memory, they may work with a contiguous copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxprune.graph.symbolic_shapes import SymbolicShapes
from fxprune.runtime.torch_internals import current_size, shapes_only, tree_leaves

Later = Mapping[str, list[tuple[str, bool]]]
"""Stand-ins of regions, by exit, and whether they are made contiguous."""


def layout_conflict(shapes: SymbolicShapes, exit_: str, stand_in: str, later: Later, contiguous: bool = False) -> str:
    """Say why the readers of a value cannot read its stand-in because of its memory layout.

    Parameters
    ----------
    shapes : SymbolicShapes
        Values of the graph. Exit and stand-in have equal shapes.
    exit_, stand_in : str
        Nodes whose values are compared.
    later : mapping of str to list of (str, bool)
        Stand-ins of the regions after this one, by exit, and whether they are made contiguous. The same plan may remove
        these regions, so the layout of the stand-in must also be right for what follows them.
    contiguous : bool
        Whether the readers get the stand-in made contiguous.

    Returns
    -------
    str
        The reason in words; "" if the layouts are equal, or if all later nodes work with both.

    Examples
    --------
    >>> layout_conflict(shapes, "linear", "permute", {})           # doctest: +SKIP
    "its stand-in 'permute' has another memory layout than 'linear', and 'view' cannot work with it"
    """
    if not contiguous and equal_layouts(shapes.values[exit_], shapes.values[stand_in]):
        return ""
    new = (stand_in, contiguous)
    conflict = _follow(shapes, exit_, new, {}) or _follow(shapes, exit_, new, later)
    return f"its stand-in {stand_in!r} has another memory layout than {exit_!r}, and {conflict}" if conflict else ""


def equal_layouts(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of equal shapes have equal strides at the observed sizes. Those of sizes of 1 may differ."""
    return all(
        current_size(size) == 1 or current_size(a) == current_size(b)
        for size, a, b in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


def _follow(shapes: SymbolicShapes, exit_: str, new: tuple[str, bool], later: Later) -> str:
    """Compute the values after an exit again, with its stand-in in its place. Return what does not work, or ""."""
    interpreter = shapes.interpreter
    before = interpreter.env
    nodes = {node.name: node for node in before}
    interpreter.env = dict(before)
    changed = {nodes[exit_]}

    def value_of(stand_in: str, contiguous: bool) -> Any:
        value = interpreter.env[nodes[stand_in]]
        return value.contiguous() if contiguous else value

    try:
        with shapes_only(interpreter.mode):
            interpreter.env[nodes[exit_]] = value_of(*new)
            for node in interpreter.graph.nodes:
                sources = [found for found in later.get(node.name, ()) if nodes[found[0]] in changed]
                if node in changed or not (sources or changed.intersection(node.all_input_nodes)):
                    continue
                if node.op == "output":
                    return _output_conflict(node, interpreter.env, before)
                if node not in before:
                    return f"the layout of {node.name!r}, which depends on it, is not known"
                interpreter.env[node] = value_of(*sources[0]) if sources else interpreter.compute(node)
                if not _equal_trees(interpreter.env[node], before[node]):
                    changed.add(node)
    except Exception:  # operations raise all kinds of errors for values that they cannot take
        return f"{node.name!r} cannot work with it"
    finally:
        interpreter.env = before
    return ""


def _equal_trees(first: Any, second: Any) -> bool:
    """Whether all tensors in two nested containers have equal layouts."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(equal_layouts(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor))


def _output_conflict(output: fx.Node, env: Mapping[fx.Node, Any], before: Mapping[fx.Node, Any]) -> str:
    """Say which value of the output would no longer be contiguous: code outside the graph may need that."""
    for node in output.all_input_nodes:
        pairs = zip(tree_leaves(before.get(node)), tree_leaves(env.get(node)), strict=True)
        if any(isinstance(old, torch.Tensor) and _is_contiguous(old) and not _is_contiguous(new) for old, new in pairs):
            return f"{node.name!r} leaves the graph: code outside may need it to be contiguous"
    return ""


def _is_contiguous(value: torch.Tensor) -> bool:
    """Whether a tensor is contiguous at the observed sizes. `Tensor.is_contiguous` would fix symbolic sizes."""
    expected = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if current_size(size) != 1 and current_size(stride) != expected:
            return False
        expected *= current_size(size)
    return True
