"""Traces a module to one graph that is the same in train and in eval mode, or says why that is not possible."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import extract_tb
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.tracer import TRACED_CALL, ArgumentPath, FunctionalTracer, Switches
from fxprune.graph.fx_utils import CONSTANT_ARGUMENTS, TRACED_MODULES, format_argument, graph_structure, is_weighted
from fxprune.graph.records import Refusal
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


Arguments = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of a call."""


def constant_arguments(module: nn.Module, calls: Sequence[Arguments]) -> dict[str, Any] | Untraced:
    """Find the arguments of a module that were the same constant in all its calls.

    Constants are None, bool, str, and numbers for arguments with a default, also in tuples. An argument that was not
    given counts as its default.

    Parameters
    ----------
    module : Module
        The module.
    calls : sequence of (args, kwargs)
        Arguments of its calls; in place of tensors, any values that are no constants.

    Returns
    -------
    dict or Untraced
        By the name of the argument. Keyword arguments that the forward collects appear under their own names, and
        ``*args`` as ``"*args": ()`` if nothing was collected. `Untraced` if a call does not fit the signature, or if
        the forward collects a keyword argument that is no constant.

    Examples
    --------
    >>> constant_arguments(nn.Bilinear(1, 1, 1), [((0.5, None), {}), ((1.5, None), {})])
    {'input2': None}
    """
    signature = inspect.signature(type(module).forward)
    try:
        bound = [_bind(signature, args, kwargs) for args, kwargs in calls]
    except TypeError as error:
        return Untraced(f"it is called with arguments that its forward does not name ({error})")
    given = {name for values in bound for name in values}
    constants: dict[str, Any] = {}
    for name in sorted(given):
        kept = signature.parameters.get(name)
        optional = kept is None or kept.default is not inspect.Parameter.empty
        values = [values.get(name, _MISSING) for values in bound]
        if name.startswith("*"):
            constants |= {} if any(values) else {name: ()}
        elif is_constant(values[0], numbers=optional) and len({repr(value) for value in values}) == 1:
            constants[name] = values[0]
        elif kept is None:
            return Untraced(f"its forward collects the keyword argument {name!r}, whose value is not always the same")
    return constants


_MISSING = object()


def _bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one call by name, with defaults; collected keyword arguments under their own names."""
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    values = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            values |= values.pop(name)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            values[f"*{name}"] = values.pop(name)
    return values


def is_constant(value: Any, numbers: bool = True) -> bool:
    """Whether a value is None, bool, str, a finite number (if `numbers`), or a tuple of these.

    Examples
    --------
    >>> is_constant(("a", None)), is_constant(1, numbers=False), is_constant([1]), is_constant(float("nan"))
    (True, False, False, False)
    """
    if type(value) is tuple:
        return all(is_constant(item, numbers) for item in value)
    if type(value) in (int, float):
        return numbers and math.isfinite(value)
    return value is None or type(value) in (bool, str)


def trace_module(
    module: nn.Module,
    opaque: Collection[str],
    fixed_opaque: bool = False,
    constants: Mapping[str, Any] = MappingProxyType({}),
    identities: Collection[str] = (),
) -> Traced | Untraced:
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
    constants : mapping of str to object
        Values of arguments that are constants in the graph, from `constant_arguments`. The graph takes these arguments
        and does not read them.
    identities : collection of str
        Paths of modules that return an argument. They are no nodes of the graph.

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
            options = _TraceOptions(frozenset(reasons), constants, frozenset(identities))
            gm = _trace_both_modes(module, options)
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


@dataclass(frozen=True)
class _Trace:
    """One trace: the graph, its tracer, and the tensors that the forward makes itself, by their names in the graph."""

    graph: fx.Graph
    tracer: FunctionalTracer
    tensors: Mapping[str, torch.Tensor]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The structure of the graph, with the values of the tensors that it makes."""
        rows = zip(self.graph.nodes, graph_structure(self.graph), strict=True)
        return [
            (*row, repr(self.tensors[str(node.target)].tolist()))
            if node.op == "get_attr" and str(node.target) in self.tensors
            else row
            for node, row in rows
        ]

    def owner(self, position: int) -> str:
        """Path of the module whose forward creates a node."""
        return self.tracer.owners.get(list(self.graph.nodes)[position].name, "")


@dataclass(frozen=True)
class _TraceOptions:
    """Options of a `FunctionalTracer`."""

    opaque: frozenset[str]
    constants: Mapping[str, Any]
    identities: frozenset[str]


def _trace_both_modes(module: nn.Module, options: _TraceOptions) -> fx.GraphModule:
    """Trace in train and in eval mode. Raises `_TraceFailure` if one of them fails or the graphs differ."""
    with preserve_state(module):  # a forward may write attributes and buffers
        return _compare_modes(module, options)


def _compare_modes(module: nn.Module, options: _TraceOptions) -> fx.GraphModule:
    modes = {part: part.training for part in module.modules()}
    trace = partial(_trace_once, module, options)
    try:
        module.train()
        trained = trace()
        module.eval()
        merged = evaluated = trace()
        if trained.rows != evaluated.rows:
            switches = find_switches(trained.graph, evaluated.graph)
            if not switches or not _are_read_by_owners(trace, trained, evaluated, switches):
                raise _TraceFailure(*_first_difference(trained, evaluated))
            module.eval()
            ordinals = [evaluated.tracer.ordinals[node.name] for node in evaluated.graph.nodes]
            merged = trace(switches={ordinals[position]: found for position, found in switches.items()})
    finally:
        for part, training in modes.items():
            part.training = training
    gm = _make_graph_module(module, merged)
    gm.meta[TRACED_MODULES] = list(merged.tracer.traced_modules)
    gm.meta[TRACED_CALL] = merged.tracer.call
    gm.meta[CONSTANT_ARGUMENTS] = dict(options.constants)
    return gm


def _trace_once(module: nn.Module, options: _TraceOptions, switches: Switches = MappingProxyType({})) -> _Trace:
    """Trace in the present modes. The module keeps its buffers, and no attribute that the trace adds."""
    tracer = FunctionalTracer(options.opaque, options.constants, switches, options.identities)
    before = set(vars(module))
    buffers = {path: (value, value.detach().clone()) for path, value in module.named_buffers()}
    overwritten: list[str] = []
    try:
        with preserve_state(module, _holds_proxy):  # what is left, a counter for example, shows in the graph
            graph = tracer.trace(module)
            overwritten += [path for path, values in buffers.items() if not _same_values(*values)]
    except Exception as error:  # a forward can raise any error on symbolic values
        raise _TraceFailure(tracer.failed_module or "", _describe_failure(error)) from error
    finally:
        made = {name: value for name, value in vars(module).items() if name not in before}
        for name in made:
            delattr(module, name)
    for path in overwritten:  # which the graph would not do
        owner, _, buffer = path.rpartition(".")
        raise _TraceFailure(owner, f"its forward overwrites its buffer {buffer!r}")
    return _Trace(graph, tracer, {name: value for name, value in made.items() if isinstance(value, torch.Tensor)})


def _same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _holds_proxy(value: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value))


def find_switches(trained: fx.Graph, evaluated: fx.Graph) -> Switches:
    """Compare the graphs of a module in train and in eval mode.

    Returns
    -------
    Switches
        The constant arguments that differ, by the position of the node; empty if anything else differs.
    """
    switches: dict[int, dict[ArgumentPath, tuple[Any, Any]]] = {}
    words = {node: f"%{position}" for graph in (trained, evaluated) for position, node in enumerate(graph.nodes)}
    if len(trained.nodes) != len(evaluated.nodes):
        return {}
    for position, (first, second) in enumerate(zip(trained.nodes, evaluated.nodes, strict=True)):
        found = dict(_differences((first.args, first.kwargs), (second.args, second.kwargs), words))
        switchable = first.op.startswith("call_") and all(
            map(is_constant, (v for pair in found.values() for v in pair))
        )
        if (first.op, first.target) != (second.op, second.target) or (found and not switchable):
            return {}
        if found:
            switches[position] = {path: (off, on) for path, (on, off) in found.items()}
    return switches


def _differences(
    first: Any, second: Any, words: Mapping[Any, str], path: ArgumentPath = ()
) -> Iterator[tuple[ArgumentPath, tuple[Any, Any]]]:
    """Yield the path of each value that differs between two nested arguments, and both values."""
    pairs: Any = ()
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
    elif isinstance(first, dict) and isinstance(second, dict) and list(first) == list(second):
        pairs = ((key, (first[key], second[key])) for key in first)
    elif format_argument(first, words) != format_argument(second, words):
        yield path, (first, second)
    for key, pair in pairs:
        yield from _differences(pair[0], pair[1], words, (*path, key))


def _are_read_by_owners(trace: Callable[[], _Trace], trained: _Trace, evaluated: _Trace, switches: Switches) -> bool:
    """Whether each switch depends on the mode of the module whose forward creates the node, and on no other mode.

    The module is traced with only these modules in train mode.
    """
    for path in {evaluated.owner(position) for position in switches}:
        evaluated.tracer.root.get_submodule(path).training = True
    rows = zip(trained.rows, evaluated.rows, strict=True)
    return trace().rows == [on if position in switches else off for position, (on, off) in enumerate(rows)]


def _describe_failure(error: Exception) -> str:
    if isinstance(error, Refusal):
        return f"its forward {error}"
    return f"its forward could not be traced ({describe_exception(error)})"


def _first_difference(trained: _Trace, evaluated: _Trace) -> tuple[str, str]:
    """Return the path of the module whose graph depends on the mode, and the reason in words."""
    rows, others = trained.rows, evaluated.rows
    index = next((i for i, (a, b) in enumerate(zip(rows, others, strict=False)) if a != b), min(len(rows), len(others)))
    shown = trained if index < len(rows) and rows[index][0] != "output" else evaluated
    node = list(shown.graph.nodes)[index].name
    return shown.owner(index), f"its graph is not the same in train and in eval mode (from node {node!r} on)"


_MODULE_ATTRIBUTES = MODULE_FIELDS | {"meta"}


def _make_graph_module(module: nn.Module, trace: _Trace) -> fx.GraphModule:
    """Make the GraphModule for a module, with the same modes and the same public attributes that are not tensors."""
    for name, value in trace.tensors.items():
        setattr(module, name, value)
    gm = fx.GraphModule(module, trace.graph, type(module).__name__)
    for name in trace.tensors:
        delattr(module, name)
    _keep_out_of_state(gm, module)
    for path, part in gm.named_modules():
        part.training = module.get_submodule(path).training
    kept = {key: value for key, value in module.__dict__.items() if key not in _MODULE_ATTRIBUTES}
    kept = {
        key: value for key, value in kept.items() if not key.startswith("_") and not isinstance(value, torch.Tensor)
    }
    for key, value in kept.items():
        setattr(gm, key, value)
    keep_when_copied(gm, kept)
    return gm


def _keep_out_of_state(gm: fx.GraphModule, module: nn.Module) -> None:
    """Keep the tensors of a graph that are not in the module's state out of the graph module's state too."""
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    buffers = {path: value for path, value in gm.named_buffers() if path in read}
    saved = module.state_dict() if buffers else {}
    for path, value in buffers.items():
        owner, _, name = path.rpartition(".")
        if path not in saved:
            delattr(gm.get_submodule(owner), name)
            gm.get_submodule(owner).register_buffer(name, value, persistent=False)
