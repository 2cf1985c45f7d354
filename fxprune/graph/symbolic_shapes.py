"""Shapes of every value of a graph, proved for all batch and image sizes with symbolic fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)
from torch.utils._pytree import tree_map_only

from fxprune.graph.fx_utils import map_tensors
from fxprune.runtime.signals import defer_interrupts


@dataclass(frozen=True)
class TensorSpec:
    """What is kept of a tensor that went into a module: `shape`, `dtype` and `device`, not its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def tensor_specs(tree: Any) -> Any:
    """Replace every tensor of nested containers by its `TensorSpec`."""
    return map_tensors(tree, lambda value: TensorSpec(tuple(value.shape), value.dtype, value.device))


@dataclass(frozen=True)
class SymbolicShapes:
    """Symbolic shape and dtype of the values of one graph.

    Attributes
    ----------
    values : mapping of str to FakeTensor
        By node name; only single tensors.
    failure : str
        Why the propagation stopped before the end of the graph, or "".
    """

    values: Mapping[str, FakeTensor]
    failure: str

    def provably_equal(self, first: str, second: str) -> bool:
        """Whether two values have the same dtype and, for every batch and image size, the same shape."""
        return self.equal_when_observed(first, second) and all(
            a is b or statically_known_true(a == b)
            for a, b in zip(self.values[first].shape, self.values[second].shape, strict=True)
        )

    def equal_when_observed(self, first: str, second: str) -> bool:
        """Whether two values have the same dtype and shape at the size they were observed at."""
        if first not in self.values or second not in self.values:
            return False
        a, b = self.values[first], self.values[second]
        return a.dtype == b.dtype and self.observed_shape(first) == self.observed_shape(second)

    def observed_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value at the observed size."""
        return tuple(_size_hint(size) for size in self.values[name].shape)


def _size_hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def propagate_symbolic(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SymbolicShapes:
    """Run a graph on fake tensors whose batch, height and width are symbols.

    Parameters
    ----------
    gm : GraphModule
        The graph; its weights are faked, not copied.
    args, kwargs
        What the graph was called with, tensors as `TensorSpec`.

    Returns
    -------
    Signatures
        An operation that has no symbolic shape rule ends the propagation and is named in `failure`.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    recorder = _SymbolicShapeInterpreter(gm, mode)
    failure = ""
    inputs = tree_map_only(TensorSpec, lambda spec: _make_symbolic_tensor(mode, spec), (list(args), dict(kwargs)))
    with mode, enable_python_dispatcher(), torch.no_grad():
        try:
            recorder.run(*bind_placeholders(gm, *inputs))
        except Exception as error:  # any operation may refuse symbols in any way of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failure = f"the shape of {recorder.current!r} could not be followed ({reason[:160]})"
    return SymbolicShapes(recorder.values, failure)


def bind_placeholders(gm: fx.GraphModule, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """Order call arguments as the graph's placeholders stand, defaults filled in.

    Raises
    ------
    TypeError
        If the graph cannot be called so.
    """
    values = list(args)
    for node in [node for node in gm.graph.nodes if node.op == "placeholder"][len(values) :]:
        name = str(node.target)
        if name not in kwargs and not node.args:
            raise TypeError(f"argument {name!r} of the captured graph is missing")
        values.append(kwargs[name] if name in kwargs else node.args[0])
    return values


def _make_symbolic_tensor(mode: FakeTensorMode, spec: TensorSpec) -> torch.Tensor:
    real = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
    rank = len(spec.shape)
    channel = {4: 1, 3: 2, 2: 1, 5: 1}.get(rank, rank)
    sizes = [DimDynamic.STATIC if dim == channel or spec.shape[dim] <= 1 else DimDynamic.DYNAMIC for dim in range(rank)]
    sizes = [DimDynamic.DYNAMIC if dim == 0 else size for dim, size in enumerate(sizes)]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, dynamic_strides=[DimDynamic.INFER_STRIDE] * rank)
    return mode.from_tensor(real, symbolic_context=context)


_MAX_FORMULA_OPS = 4
"""Operations from which the formula of a size gets a symbol of its own."""


class _SymbolicShapeInterpreter(fx.Interpreter):
    """Runs a graph on fake tensors and keeps the formulas of their sizes short.

    A size given by a long formula is replaced by a fresh symbol, the same for the same formula. What is proved for
    every value of the symbol holds for those the formula takes; only equalities between different formulas are lost.
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
        if isinstance(size, int) or size.node.expr.count_ops() <= _MAX_FORMULA_OPS:
            return size
        formula, shape_env = size.node.expr, self.mode.shape_env
        if formula not in self.symbols:
            assert shape_env is not None
            hint, source = _size_hint(size), ConstantSource(f"size_{len(self.symbols)}")
            symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            self.symbols[formula] = shape_env.create_symintnode(symbol, hint=hint, source=source)
        return self.symbols[formula]
