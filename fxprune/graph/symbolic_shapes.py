"""Computes the shape of every value of a graph as formulas that hold for all batch and image sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxprune.errors import BatchError
from fxprune.graph.fx_utils import CONSTANT_ARGUMENTS, full_precision, map_tensors
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
    """Shape, dtype, device and strides of a tensor, without its values; without strides, it is contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...] | None = None


def tensor_specs(tree: Any) -> Any:
    """Replace every tensor in nested containers by its `TensorSpec`."""
    return map_tensors(tree, _tensor_spec)


def _tensor_spec(value: torch.Tensor) -> TensorSpec:
    strides = None if value.layout != torch.strided or value.is_contiguous() else value.stride()
    return TensorSpec(tuple(value.shape), value.dtype, value.device, strides)


@dataclass(frozen=True)
class SymbolicShapes:
    """Shapes of the values of one graph, with symbols for the batch and image sizes.

    Attributes
    ----------
    values : mapping of str to FakeTensor
        Shape and dtype of each value that is a single tensor, by node name.
    failure : str
        Why the shapes after some node are missing; "" if none are.
    interpreter : ShapeInterpreter
        Computed the shapes, and can compute again those that follow a replaced value.
    """

    values: Mapping[str, FakeTensor]
    failure: str
    interpreter: ShapeInterpreter = field(repr=False)

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
    recorder = ShapeInterpreter(gm, mode)
    failure = ""
    inputs = tree_map_only(TensorSpec, lambda spec: _symbolic_input(mode, spec), (list(args), dict(kwargs)))
    with shapes_only(mode):
        try:
            recorder.run(*bind_placeholders(gm, *inputs))
        except Exception as error:  # operations raise all kinds of errors for symbolic sizes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failure = f"the shape of {recorder.current!r} could not be followed ({reason[:160]})"
    return SymbolicShapes(recorder.values, failure, recorder)


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
    """Return a fake tensor in which all sizes are symbols except the channels and, after the batch size, sizes of 1.

    It is in float32 if a call under autocast was observed with half precision, because the weights are in float32.
    """
    real = full_precision(torch.empty(spec.shape, dtype=spec.dtype, device=spec.device))
    if spec.strides is not None:
        real = torch.empty_strided(spec.shape, spec.strides, dtype=real.dtype, device=spec.device)
    rank = len(spec.shape)
    channel = {4: 1, 3: 2, 2: 1, 5: 1}.get(rank, rank)
    dynamic = [dim == 0 or (dim != channel and spec.shape[dim] > 1) for dim in range(rank)]
    return make_symbolic_tensor(mode, real, dynamic)


_MAX_FORMULA_OPS = 4
"""A size whose formula has more operations is replaced by a new symbol."""


class ShapeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors and keeps the formulas of their sizes short.

    A size with a long formula is replaced by a new symbol. Equal formulas get the same symbol. The proofs stay valid,
    because they hold for all values of the new symbol. But equalities between different formulas are no longer found.
    The order of the dimensions in memory stays.

    Attributes
    ----------
    env : dict
        The value of every node so far.
    values : dict of str to FakeTensor
        The values that are a single tensor, by node name.
    current : str
        Name of the last node.
    """

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.extra_traceback = False
        self.mode = mode
        self.values: dict[str, FakeTensor] = {}
        self.current = ""
        self.symbols: dict[Any, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and record its value."""
        self.current = n.name
        value = self.compute(n)
        if isinstance(value, FakeTensor):
            self.values[n.name] = value
        return value

    def compute(self, node: fx.Node) -> Any:
        """Compute the value of a node from those in `env`, with short formulas."""
        with defer_interrupts():
            value = super().run_node(node)
        if isinstance(value, FakeTensor):
            sizes = [self._shorten(size) for size in value.shape]
            if any(new is not old for new, old in zip(sizes, value.shape, strict=True)):
                strides = self._strides(sizes, value)
                value = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return value

    def _strides(self, sizes: Sequence[Any], value: FakeTensor) -> list[Any]:
        """Return the strides of a value with other sizes. A value without gaps in memory stays without gaps."""
        old = list(value.stride())
        order = sorted(range(len(old)), key=lambda dim: (current_size(old[dim]), -dim))  # innermost first
        strides, expected, dense = [*old], 1, True
        for dim in order:
            dense = dense and (current_size(sizes[dim]) == 1 or current_size(old[dim]) == current_size(expected))
            strides[dim], expected = expected, expected * sizes[dim]
        return strides if dense else [self._shorten(stride) for stride in old]

    def _shorten(self, size: Any) -> Any:
        if isinstance(size, int) or size_formula(size).count_ops() <= _MAX_FORMULA_OPS:
            return size
        formula = size_formula(size)
        if formula not in self.symbols:
            self.symbols[formula] = new_size_symbol(self.mode, current_size(size), f"size_{len(self.symbols)}")
        return self.symbols[formula]
