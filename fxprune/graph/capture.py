"""From the module tree to islands: the largest submodules whose whole forward is one fx graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from fxprune.errors import LossError
from fxprune.graph.fx_utils import TRACED_MODULES, fingerprint, graph_structure, is_weighted, is_within, join_path
from fxprune.graph.operators import in_place_layers
from fxprune.graph.records import Island, RecordedCall
from fxprune.graph.symbolic_shapes import tensor_specs
from fxprune.graph.tracer import FunctionalTracer

_MAX_TRACE_ATTEMPTS = 64


def capture_islands(
    model: nn.Module, run: Callable[[nn.Module], Any], whole_model_is_graph: bool
) -> tuple[nn.Module, list[Island]]:
    """Replace every island of a model by its `GraphModule`.

    Parameters
    ----------
    model : Module
        A private copy; it is changed.
    run : callable
        ``(model) -> anything``: runs the model on one batch, the same way each time. Called once to see which
        modules are called and with what, and once more to hold every graph to the outputs of the module it replaced;
        a graph that gives anything else is taken back, and the search goes on below it.
    whole_model_is_graph : bool
        Whether a graph may stand in for the whole model.

    Returns
    -------
    model : Module
        The copy with its islands in place; a `GraphModule` if the whole model is one.
    islands : list of Island
        Outer ones before those nested in what stayed opaque inside them.

    Raises
    ------
    LossError
        If the run called no layer of the model.
    """
    shell = nn.Module()
    shell.add_module("root", model)
    calls = record_module_calls(shell, run)
    if not calls and any(True for _ in model.parameters()):
        raise LossError(f"the loss does not depend on the model: no layer of {type(model).__name__} was called")
    islands = list(
        _find_islands(shell, "root", calls) if whole_model_is_graph else _find_islands_below(shell, "root", calls)
    )
    while True:
        originals = {island.name: shell.get_submodule(island.name) for island in islands}
        for island in islands:
            replace_module(shell, island.name, island.gm)
        unfaithful = _first_unfaithful(shell, islands, calls, run)
        if unfaithful is None:
            break
        for island in reversed(islands):
            replace_module(shell, island.name, originals[island.name])
        islands = [island for island in islands if not is_within(island.name, unfaithful)]
        islands += _find_islands_below(shell, unfaithful, calls)
    return shell.get_submodule("root"), [replace(island, name=island.name[len("root.") :]) for island in islands]


def record_module_calls(shell: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, RecordedCall]:
    """Run ``shell.root`` once and return, by path, what each module was called with and what it gave."""
    calls: dict[str, RecordedCall] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in shell.named_modules():
            if name and any(True for _ in module.parameters()):
                hooks.enter_context(_recording_hooks(module, name, calls))
        run(shell.get_submodule("root"))
    return calls


@contextmanager
def _recording_hooks(module: nn.Module, name: str, calls: dict[str, RecordedCall]) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(name, RecordedCall(tensor_specs(args), tensor_specs(kwargs), []))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        calls[name].outputs.append(_digest(output))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _digest(output: Any) -> tuple[str, list[Any]]:
    """Structure of a value, and of every tensor in it shape, dtype, sum and norm; nothing else is kept."""
    leaves, structure = tree_flatten(output)
    return str(structure), [
        (tuple(leaf.shape), leaf.dtype, *_moments(leaf)) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    ]


def _moments(value: torch.Tensor) -> tuple[float, float]:
    value = value.detach().float()
    return float(value.sum()), float(torch.linalg.vector_norm(value))


def _first_unfaithful(
    shell: nn.Module, islands: list[Island], calls: dict[str, RecordedCall], run: Callable[[nn.Module], Any]
) -> str | None:
    """Run the model with its islands installed; name the first whose outputs are not those of its module."""
    seen: dict[str, RecordedCall] = {}
    failure: Exception | None = None
    with ExitStack() as hooks, torch.no_grad():
        for island in islands:
            hooks.enter_context(_recording_hooks(island.gm, island.name, seen))
        try:
            run(shell.get_submodule("root"))
        except Exception as error:  # a graph may fail on real values in any way of its own
            failure = error
    wrong = [name for name, call in seen.items() if not _digests_equal(call.outputs, calls[name].outputs)]
    if wrong:
        return max(wrong, key=len) if failure is not None else wrong[0]
    if failure is not None:
        raise failure
    return None


def _digests_equal(first: Any, second: Any) -> bool:
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(_digests_equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, float):
        return math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-4) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


def _find_islands(model: nn.Module, name: str, calls: dict[str, RecordedCall]) -> Iterator[Island]:
    """Yield the outermost traceable modules at and below a path, and those nested in what is opaque in them."""
    module = model.get_submodule(name)
    if name in calls:
        traced = trace_module(module, frozenset())
        if traced is not None:
            gm, opaque = traced
            yield Island(name, gm, tuple(sorted(opaque)), calls[name], fingerprint(gm))
            for path in sorted(opaque):
                yield from _find_islands_below(model, join_path(name, path), calls)
            return
    yield from _find_islands_below(model, name, calls)


def _find_islands_below(model: nn.Module, name: str, calls: dict[str, RecordedCall]) -> Iterator[Island]:
    for child, _ in model.get_submodule(name).named_children():
        yield from _find_islands(model, join_path(name, child), calls)


def trace_module(
    module: nn.Module, opaque: frozenset[str], fixed_opaque: bool = False
) -> tuple[fx.GraphModule, frozenset[str]] | None:
    """Trace a module whose graph is the same in train and in eval mode.

    A part that cannot be traced, or whose graph depends on the mode, becomes opaque: one node of the graph.

    Parameters
    ----------
    module : Module
        The module; its layers are shared with the graph, its modes are restored.
    opaque : frozenset of str
        Paths that are opaque from the start.
    fixed_opaque : bool
        Whether these are all that may be opaque.

    Returns
    -------
    (GraphModule, frozenset of str) or None
        None if the module's own forward is the part that cannot be traced, or no layer with weights was captured.
    """
    for _ in range(1 if fixed_opaque else _MAX_TRACE_ATTEMPTS):
        traced = _trace_both_modes(module, opaque)
        if isinstance(traced, fx.GraphModule):
            captured = any(is_weighted(traced, node) for node in traced.graph.nodes if node.target not in opaque)
            return (traced, opaque) if captured else None
        if traced == "" or traced in opaque:
            return None
        kind = type(module.get_submodule(traced))
        opaque |= {path for path, part in module.named_modules() if path and type(part) is kind}
    return None


def _trace_both_modes(module: nn.Module, opaque: frozenset[str]) -> fx.GraphModule | str:
    """Trace in train and eval mode; give the graph, or the path of the module that stands in the way."""
    modes = {part: part.training for part in module.modules()}
    graphs: list[tuple[fx.Graph, FunctionalTracer]] = []
    try:
        for training in (True, False):
            module.train(training)
            tracer = FunctionalTracer(opaque)
            try:
                graphs.append((tracer.trace(module), tracer))
            except Exception:  # a forward may fail on symbolic values in any way of its own
                return tracer.failed_module or ""
    finally:
        for part, training in modes.items():
            part.training = training
    (trained, first), (evaluated, second) = graphs
    difference = _first_difference(trained, evaluated)
    if difference is not None:
        return (first if difference[0] is trained else second).owners.get(difference[1], "")
    gm = _make_graph_module(module, evaluated)
    gm.meta[TRACED_MODULES] = list(second.traced_modules)
    return gm


def _first_difference(first: fx.Graph, second: fx.Graph) -> tuple[fx.Graph, str] | None:
    rows, others = graph_structure(first), graph_structure(second)
    if rows == others:
        return None
    index = next((i for i, (a, b) in enumerate(zip(rows, others, strict=False)) if a != b), min(len(rows), len(others)))
    graph = first if index < len(rows) and rows[index][0] != "output" else second
    return graph, list(graph.nodes)[index].name


_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__) | {"_graph", "_code", "meta"}


def _make_graph_module(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Make the GraphModule that stands for a module: same mode, and the plain attributes others look for on it."""
    gm = fx.GraphModule(module, graph, type(module).__name__)
    gm.training = module.training
    kept = {key: value for key, value in module.__dict__.items() if key not in _MODULE_ATTRIBUTES}
    kept = {
        key: value for key, value in kept.items() if not key.startswith("_") and not isinstance(value, torch.Tensor)
    }
    for key, value in kept.items():
        setattr(gm, key, value)
    gm.meta["_user_preserved_attributes"] = kept | gm.meta.get("_user_preserved_attributes", {})
    return gm


def replace_module(model: nn.Module, name: str, new: nn.Module, functional: bool = True) -> None:
    """Put a module where another one stands, under every path that leads there.

    Layers that a graph calls compute into new tensors from then on: a bypass makes values live longer than the
    in-place flag assumed, and a recorded value must not be overwritten. If it need not be `functional`, those that
    overwrite a fresh value which nothing else reads keep their flag.
    """
    if isinstance(new, fx.GraphModule):
        for _, layer, harmless in in_place_layers(new):
            layer.inplace = bool(layer.inplace) and harmless and not functional  # type: ignore[assignment]
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
