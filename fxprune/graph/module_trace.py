"""Traces a module to one graph that is the same in train and in eval mode, or says why that is not possible."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import fx, nn

from fxprune.graph.fx_utils import TRACED_MODULES, graph_structure, is_weighted
from fxprune.graph.tracer import FunctionalTracer
from fxprune.runtime.private_copy import MODULE_FIELDS, preserve_state
from fxprune.runtime.torch_internals import keep_when_copied, tree_leaves


@dataclass(frozen=True)
class Traced:
    """A module as one graph.

    Attributes
    ----------
    gm : GraphModule
        The graph; the layers are shared with the module.
    opaque : mapping of str to str
        Paths that stayed one node, each with the reason.
    """

    gm: fx.GraphModule
    opaque: Mapping[str, str]


@dataclass(frozen=True)
class Untraced:
    """A module that is not one graph, and the `reason` in words; "" if no layer with weights was captured."""

    reason: str


def describe_exception(error: Exception) -> str:
    """Return an exception in words: its type, the first sentence of its message, and the line of the model's code.

    Examples
    --------
    >>> describe_exception(TypeError("no len. Use size."))
    'TypeError: no len'
    """
    lines = str(error).strip().splitlines() or [""]
    said = f"{type(error).__name__}: {lines[0].split('. ')[0][:200]}" if lines[0] else type(error).__name__
    frames = [frame for frame in extract_tb(error.__traceback__) if not _is_tracing_code(frame.filename)]
    return f"{said}; {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else said


def _is_tracing_code(file: str) -> bool:
    """Whether a file belongs to torch or to this package, and not to the model."""
    return any(folder in Path(file).parents for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def trace_module(module: nn.Module, opaque: Collection[str], fixed_opaque: bool = False) -> Traced | Untraced:
    """Trace a module whose graph is the same in train and in eval mode.

    A part that cannot be traced, or whose graph depends on the mode, becomes opaque: one node of the graph. So do all
    other parts of its class.

    Parameters
    ----------
    module : Module
        The module. It shares its layers with the graph; its modes, buffers and attributes are restored.
    opaque : collection of str
        Paths that are opaque from the start.
    fixed_opaque : bool
        Whether no other paths may become opaque.

    Returns
    -------
    Traced or Untraced
        `Untraced` if the module's own forward cannot be traced, or no layer with weights was captured.
    """
    if "forward" in vars(module):  # a trace would follow the forward of its class
        return Untraced("its forward was replaced on the module itself, as by a hook library or a patch")
    reasons = dict.fromkeys(opaque, "")
    while True:  # every failure makes one more class opaque
        try:
            gm = _trace_both_modes(module, frozenset(reasons))
        except _TraceFailure as failure:
            if failure.path == "":
                return Untraced(failure.reason)
            if fixed_opaque or failure.path in reasons:
                return Untraced(f"its part {failure.path!r} is not one graph: {failure.reason}")
            kind = type(module.get_submodule(failure.path))
            same = [path for path, part in module.named_modules() if path and type(part) is kind]
            reasons |= {path: failure.reason for path in same if path not in reasons}
        else:
            weighted = any(is_weighted(gm, node) for node in gm.graph.nodes if node.target not in reasons)
            return Traced(gm, reasons) if weighted else Untraced("")


class _TraceFailure(Exception):
    """A module cannot be traced because of the part at `path` ("" is the module itself)."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


def _trace_both_modes(module: nn.Module, opaque: frozenset[str]) -> fx.GraphModule:
    """Trace in train and in eval mode. Raises `_TraceFailure` if one of them fails or the graphs differ."""
    with preserve_state(module):  # a forward may write attributes and buffers
        return _compare_modes(module, opaque)


def _compare_modes(module: nn.Module, opaque: frozenset[str]) -> fx.GraphModule:
    modes = {part: part.training for part in module.modules()}
    graphs: list[tuple[fx.Graph, FunctionalTracer]] = []
    try:
        for training in (True, False):
            module.train(training)
            tracer = FunctionalTracer(opaque)
            try:
                with preserve_state(module, _holds_proxy):  # what is left, a counter for example, shows in the graph
                    graphs.append((tracer.trace(module), tracer))
            except Exception as error:  # a forward can raise any error on symbolic values
                reason = f"its forward could not be traced ({describe_exception(error)})"
                raise _TraceFailure(tracer.failed_module or "", reason) from error
    finally:
        for part, training in modes.items():
            part.training = training
    (trained, first), (evaluated, second) = graphs
    difference = _first_difference(trained, evaluated)
    if difference is not None:
        graph, node = difference
        owner = (first if graph is trained else second).owners.get(node, "")
        raise _TraceFailure(owner, f"its graph is not the same in train and in eval mode (from node {node!r} on)")
    gm = _make_graph_module(module, evaluated)
    gm.meta[TRACED_MODULES] = list(second.traced_modules)
    return gm


def _holds_proxy(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value))


def _first_difference(first: fx.Graph, second: fx.Graph) -> tuple[fx.Graph, str] | None:
    rows, others = graph_structure(first), graph_structure(second)
    if rows == others:
        return None
    index = next((i for i, (a, b) in enumerate(zip(rows, others, strict=False)) if a != b), min(len(rows), len(others)))
    graph = first if index < len(rows) and rows[index][0] != "output" else second
    return graph, list(graph.nodes)[index].name


_MODULE_ATTRIBUTES = MODULE_FIELDS | {"meta"}


def _make_graph_module(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Make the GraphModule for a module, with the same mode and the same public attributes that are not tensors."""
    gm = fx.GraphModule(module, graph, type(module).__name__)
    gm.training = module.training
    kept = {key: value for key, value in module.__dict__.items() if key not in _MODULE_ATTRIBUTES}
    kept = {
        key: value for key, value in kept.items() if not key.startswith("_") and not isinstance(value, torch.Tensor)
    }
    for key, value in kept.items():
        setattr(gm, key, value)
    keep_when_copied(gm, kept)
    return gm
