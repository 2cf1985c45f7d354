"""Finds layers whose output is added to another operand: their fit can compensate a change of that operand."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from fxprune.graph.fx_utils import join_path
from fxprune.graph.operators import ADDITIONS, is_norm
from fxprune.rewriting.history import traced_islands


@dataclass(frozen=True)
class ResidualOperand:
    """The other operand of the sum that a layer's output is added to.

    Attributes
    ----------
    observed_at : str
        Path of an earlier layer whose input or output is the operand.
    is_input : bool
        Whether the operand is the input of that layer; otherwise it is the output.
    norm : str or None
        Path of the norm between the layer and the sum, if there is one.
    """

    observed_at: str
    is_input: bool
    norm: str | None = None


def find_residual_operands(model: nn.Module) -> dict[str, ResidualOperand]:
    """Find the layers of a pruned model whose output is read only by one sum, directly or through a norm.

    Returns
    -------
    dict of str to ResidualOperand
        The other operands, by the layer's path.
    """
    return {
        join_path(island, path): ResidualOperand(
            join_path(island, term.observed_at), term.is_input, join_path(island, term.norm) if term.norm else None
        )
        for island, gm in traced_islands(model)
        for path, term in _graph_operands(gm)
    }


def _graph_operands(gm: fx.GraphModule) -> Iterator[tuple[str, ResidualOperand]]:
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    for total in gm.graph.nodes:
        operands = [value for value in total.args if isinstance(value, fx.Node)]
        if total.target not in {*ADDITIONS, operator.iadd} or len(operands) != 2 or operands[0] is operands[1]:
            continue
        for last, other in (operands, operands[::-1]):
            observer = _find_observer(other, order[last], order)
            if observer is None or last.op != "call_module" or len(last.users) != 1:
                continue
            yield str(last.target), ResidualOperand(*observer)
            before = last.args[0] if last.args else None
            if (
                is_norm(gm, last)
                and isinstance(before, fx.Node)
                and before.op == "call_module"
                and len(before.users) == 1
            ):
                yield str(before.target), ResidualOperand(*observer, str(last.target))


def _find_observer(value: fx.Node, end: int, order: dict[fx.Node, int]) -> tuple[str, bool] | None:
    """Return the path of a layer before index `end` that outputs or reads a value, and whether it reads the value."""
    if value.op == "call_module" and order[value] < end:
        return str(value.target), False
    readers = sorted((user for user in value.users if user.op == "call_module"), key=order.__getitem__)
    first = next((user for user in readers if user.args and user.args[0] is value and order[user] < end), None)
    return None if first is None else (str(first.target), True)
