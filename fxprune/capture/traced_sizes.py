"""Follows sizes while a module is traced: shapes after a star, and comparisons of sizes that are as good as known."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

from torch import fx

from fxprune.graph.fx_utils import qualified_name
from fxprune.graph.records import Refusal


def is_shape(node: fx.Node) -> bool:
    """Whether a node's value is the shape of a tensor, or a slice of it.

    Examples
    --------
    >>> graph = fx.symbolic_trace(lambda x: x.shape[1:]).graph
    >>> [is_shape(node) for node in graph.nodes]
    [False, True, True, False]
    """
    while node.target is operator.getitem and isinstance(node.args[1], slice) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return bool(node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs)


_DECIDED: dict[Any, bool] = {
    **dict.fromkeys((operator.gt, operator.ge, operator.ne), True),
    **dict.fromkeys((operator.lt, operator.le, operator.eq), False),
}


def decided_condition(node: fx.Node, in_training: bool = False) -> bool | None:
    """Return the result of a condition that a program tests, if it is as good as known; None for any other node.

    A comparison of one size of a tensor with 0 or 1 is decided as if the size were at least 2. `torch.compile` and
    `torch.export` assume the same of sizes that change. The size must be that of a fixed dimension other than 0,
    counted from the start. Code that runs in train mode only may test ``torch.isfinite(x).all()``,
    ``torch.isinf(x).any()`` or ``torch.isnan(x).any()``: with `in_training`, values are taken to be finite there.

    Examples
    --------
    >>> graph = fx.symbolic_trace(lambda x: x.shape[2] > 1).graph
    >>> [decided_condition(node) for node in graph.nodes]
    [None, None, None, True, None]
    """
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if node.target in _DECIDED and len(node.args) == 2:
        number = node.args[1]
        return _DECIDED[node.target] if type(number) is int and number in (0, 1) and _is_later_size(first) else None
    alone = in_training and node.op in ("call_function", "call_method") and len(node.args) == 1 and not node.kwargs
    return _FINITE.get((_function_name(first), _function_name(node))) if alone else None


_FINITE = {("isfinite", "all"): True, ("isinf", "any"): False, ("isnan", "any"): False}


def _function_name(node: fx.Node) -> str:
    return qualified_name(node.target).rpartition(".")[2]


def _is_later_size(node: fx.Node) -> bool:
    """Whether a node's value is a size of a tensor at a dimension of 1 or more."""
    dim = node.args[1] if len(node.args) == 2 else None
    if type(dim) is not int or dim < 1 or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_method":
        return node.target == "size"
    shape = node.args[0]
    return node.target is operator.getitem and shape.target is not operator.getitem and is_shape(shape)


_MOST_DIMENSIONS = 64


@dataclass(frozen=True, eq=False)
class Starred:
    """One use of a shape after a star, while a module is traced."""

    shape: fx.Proxy


class StarredSize:
    """One of the unknown number of sizes in ``(*x.shape[:-1], 3)``, while a module is traced.

    A starred shape stands for as many of these as a tensor can have dimensions, so that no index from the start
    reaches what follows. All of them, in order, are the shape again; any other use is refused.
    """

    __slots__ = ("position", "starred")

    def __init__(self, starred: Starred, position: int) -> None:
        self.starred, self.position = starred, position

    def refuse(self, *_: Any) -> NoReturn:
        raise Refusal("uses single values of a starred shape, as in (*x.shape, 1): how many there are is not known")

    __fx_create_arg__ = __getattr__ = __call__ = __bool__ = __index__ = __int__ = __float__ = __iter__ = refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __getitem__ = refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = refuse
    __hash__ = object.__hash__


def star_shape(shape: fx.Proxy) -> Iterator[StarredSize]:
    """Return what a starred shape stands for."""
    starred = Starred(shape)
    return iter([StarredSize(starred, position) for position in range(_MOST_DIMENSIONS)])


def join_starred(values: tuple[Any, ...] | list[Any]) -> Any:
    """Return a size that contains starred shapes as the sum of these and of the tuples between them.

    Raises
    ------
    Refusal
        If the values contain a part of a starred shape only.
    """
    parts: list[Any] = []
    for starred, group in groupby(values, key=lambda value: value.starred if isinstance(value, StarredSize) else None):
        members = list(group)
        if starred is not None and [size.position for size in members] != list(range(_MOST_DIMENSIONS)):
            members[0].refuse()
        parts.append(tuple(members) if starred is None else starred.shape)
    joined = parts[0]
    for part in parts[1:]:
        joined = operator.add(joined, part)
    return joined
