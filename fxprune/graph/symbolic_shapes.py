"""Computes the shape of every value of a graph as formulas that hold for all sizes; finds shapes in a program."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import fx

from fxprune.errors import BatchError
from fxprune.graph.fx_utils import CONSTANT_ARGUMENTS, map_tensors, qualified_name
from fxprune.graph.records import Refusal
from fxprune.runtime.signals import defer_interrupts
from fxprune.runtime.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    current_size,
    make_symbolic_tensor,
    new_size_symbol,
    provably_equal,
    shapes_only,
    size_formula,
    symbolic_mode,
    tree_map_only,
)


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def tensor_specs(tree: Any) -> Any:
    """Replace every tensor in nested containers by its `TensorSpec`."""
    return map_tensors(tree, lambda value: TensorSpec(tuple(value.shape), value.dtype, value.device))


@dataclass(frozen=True)
class SymbolicShapes:
    """Shapes of the values of one graph, with symbols for the batch and image sizes.

    Attributes
    ----------
    values : mapping of str to FakeTensor
        Shape and dtype of each value that is a single tensor, by node name.
    failure : str
        Why the shapes after some node are missing; "" if none are.
    """

    values: Mapping[str, FakeTensor]
    failure: str

    def provably_equal(self, first: str, second: str) -> bool:
        """Whether two values have the same dtype and, for every batch and image size, the same shape."""
        return self.equal_when_observed(first, second) and all(
            provably_equal(a, b) for a, b in zip(self.values[first].shape, self.values[second].shape, strict=True)
        )

    def equal_when_observed(self, first: str, second: str) -> bool:
        """Whether two values have the same dtype and, at the observed input sizes, the same shape."""
        if first not in self.values or second not in self.values:
            return False
        a, b = self.values[first], self.values[second]
        return a.dtype == b.dtype and self.observed_shape(first) == self.observed_shape(second)

    def observed_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value at the observed input sizes."""
        return tuple(current_size(size) for size in self.values[name].shape)


def propagate_symbolic(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SymbolicShapes:
    """Compute the shapes of a graph's values for all batch sizes, heights and widths of its inputs.

    Parameters
    ----------
    gm : GraphModule
        The graph. Its weights are not copied.
    args, kwargs
        Arguments of an observed call, with a `TensorSpec` in place of each tensor.

    Returns
    -------
    SymbolicShapes
        The shapes up to the first operation without a symbolic shape rule; `failure` names this operation.

    Examples
    --------
    >>> gm = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1)))
    >>> spec = TensorSpec((2, 3, 8, 8), torch.float32, torch.device("cpu"))
    >>> propagate_symbolic(gm, (spec,), {}).provably_equal("input_1", "_0")
    True
    """
    mode = symbolic_mode()
    recorder = _SymbolicShapeInterpreter(gm, mode)
    failure = ""
    inputs = tree_map_only(TensorSpec, lambda spec: _symbolic_input(mode, spec), (list(args), dict(kwargs)))
    with shapes_only(mode):
        try:
            recorder.run(*bind_placeholders(gm, *inputs))
        except Exception as error:  # operations raise all kinds of errors for symbolic sizes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failure = f"the shape of {recorder.current!r} could not be followed ({reason[:160]})"
    return SymbolicShapes(recorder.values, failure)


def bind_placeholders(gm: fx.GraphModule, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the values of a graph's placeholders, in their order, for a call with these arguments.

    Parameters
    ----------
    gm : GraphModule
        The graph.
    args, kwargs
        Arguments of the call. Defaults are filled in.

    Raises
    ------
    TypeError
        If an argument without a default is missing.
    BatchError
        If an argument that is a constant in the graph has another value.

    Examples
    --------
    >>> gm = fx.symbolic_trace(torch.nn.Bilinear(2, 2, 2))
    >>> bind_placeholders(gm, ["first"], {"input2": "second"})
    ['first', 'second']
    """
    values = list(args)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in [node for node in placeholders if not str(node.target).startswith("*")][len(values) :]:
        name = str(node.target)
        if name not in kwargs and not node.args:
            raise TypeError(f"argument {name!r} of the captured graph is missing")
        values.append(kwargs[name] if name in kwargs else node.args[0])
    names = [str(node.target) for node in placeholders]
    given = {**dict(zip(names, values, strict=False)), **kwargs}
    fixed = {name: value for name, value in gm.meta.get(CONSTANT_ARGUMENTS, {}).items() if not name.startswith("*")}
    for name in (*fixed, *kwargs):
        before = _describe(fixed, name)
        if (name in fixed or name not in names) and _describe(given, name) != before:
            raise BatchError(
                f"a part of the model got {before} on the first batch, and gets {_describe(given, name)} now; give"
                " batches for which the model takes the same way"
            )
    return values


def _describe(arguments: Mapping[str, Any], name: str) -> str:
    """Return an argument in words."""
    if name not in arguments:
        return f"no {name!r}"
    value = arguments[name]
    return f"{name}={type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)}"


def _symbolic_input(mode: FakeTensorMode, spec: TensorSpec) -> torch.Tensor:
    """Return a fake tensor in which all sizes are symbols except the channels and, after the batch size, sizes of 1."""
    real = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
    rank = len(spec.shape)
    channel = {4: 1, 3: 2, 2: 1, 5: 1}.get(rank, rank)
    dynamic = [dim == 0 or (dim != channel and spec.shape[dim] > 1) for dim in range(rank)]
    return make_symbolic_tensor(mode, real, dynamic)


_MAX_FORMULA_OPS = 4
"""A size whose formula has more operations is replaced by a new symbol."""


class _SymbolicShapeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors and keeps the formulas of their sizes short.

    A size with a long formula is replaced by a new symbol. Equal formulas get the same symbol. The proofs stay valid,
    because they hold for all values of the new symbol. But equalities between different formulas are no longer found.
    """

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.mode = mode
        self.values: dict[str, FakeTensor] = {}
        self.current = ""
        self.symbols: dict[Any, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.current = n.name
        with defer_interrupts():
            value = super().run_node(n)
        if isinstance(value, FakeTensor):
            sizes = [self._shorten(size) for size in value.shape]
            if any(new is not old for new, old in zip(sizes, value.shape, strict=True)):
                value = torch.empty(sizes, dtype=value.dtype, device=value.device)
            self.values[n.name] = value
        return value

    def _shorten(self, size: Any) -> Any:
        if isinstance(size, int) or size_formula(size).count_ops() <= _MAX_FORMULA_OPS:
            return size
        formula = size_formula(size)
        if formula not in self.symbols:
            self.symbols[formula] = new_size_symbol(self.mode, current_size(size), f"size_{len(self.symbols)}")
        return self.symbols[formula]


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
