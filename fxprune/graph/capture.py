"""Captures islands: the largest submodules whose whole forward is one fx graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import LossError
from fxprune.graph.fx_utils import CONSTANT_ARGUMENTS, fingerprint, is_within, join_path
from fxprune.graph.module_trace import Traced, Untraced, constant_arguments, describe_exception, trace_module
from fxprune.graph.operators import in_place_layers
from fxprune.graph.records import Island, RecordedCall, Rejection
from fxprune.graph.symbolic_shapes import tensor_specs
from fxprune.runtime.torch_internals import tree_flatten


def capture_islands(
    model: nn.Module, run: Callable[[nn.Module], Any], whole_model_is_graph: bool
) -> tuple[nn.Module, list[Island], list[Rejection]]:
    """Replace every island of a model by its `GraphModule`.

    Parameters
    ----------
    model : Module
        A private copy; it is changed.
    run : callable
        ``(model) -> anything``: runs the model on one batch, with the same result each time. It is called once to
        record the inputs and outputs of all modules, and again to compare the outputs of every graph with those of its
        module. If they differ, the module is restored, and the search continues with its children.
    whole_model_is_graph : bool
        Whether a graph may replace the whole model.

    Returns
    -------
    model : Module
        The copy with its islands in place; a `GraphModule` if the whole model is one.
    islands : list of Island
        All islands. Outer islands come before those that are nested in their opaque parts.
    rejections : list of Rejection
        Modules that could not be captured as one graph, with the message of the exception or the difference. Their
        children may be islands.

    Raises
    ------
    LossError
        If `run` called no layer of the model.
    """
    shell = nn.Module()
    shell.add_module("root", model)
    calls = record_module_calls(shell, run)
    if not calls and any(True for _ in model.parameters()):
        raise LossError(f"the loss does not depend on the model: no layer of {type(model).__name__} was called")
    search = _Search(shell, calls)
    islands = list(search.find("root") if whole_model_is_graph else search.find_below("root"))
    while True:
        originals = {island.name: shell.get_submodule(island.name) for island in islands}
        for island in islands:
            replace_module(shell, island.name, island.gm)
        unfaithful = _first_unfaithful(shell, islands, calls, run)
        if unfaithful is None:
            break
        for island in reversed(islands):
            replace_module(shell, island.name, originals[island.name])
        name, reason = unfaithful
        search.refused[name] = reason
        islands = [island for island in islands if not is_within(island.name, name)]
        islands += search.find_below(name)
    named = [replace(island, name=_without_root(island.name)) for island in islands]
    return shell.get_submodule("root"), named, search.rejections()


def _without_root(name: str) -> str:
    return name.removeprefix("root").removeprefix(".")


def record_module_calls(shell: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, RecordedCall]:
    """Run ``shell.root`` once and return the inputs and outputs of each module, by path."""
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
        given = (tensor_specs(args), tensor_specs(kwargs))
        if name in calls:
            calls[name].later.append(given)
        else:
            calls[name] = RecordedCall(*given, [])

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
    """Return the structure of a value, and shape, dtype, sum and norm of every tensor in it."""
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
) -> tuple[str, str] | None:
    """Run the model with its islands in place. Return the first whose outputs differ from its module's, and why."""
    seen: dict[str, RecordedCall] = {}
    failure: Exception | None = None
    with ExitStack() as hooks, torch.no_grad():
        for island in islands:
            hooks.enter_context(_recording_hooks(island.gm, island.name, seen))
        try:
            run(shell.get_submodule("root"))
        except Exception as error:  # a graph can raise any error on real values
            failure = error
    wrong = [name for name, call in seen.items() if not _digests_equal(call.outputs, calls[name].outputs)]
    if wrong and failure is not None:
        return max(wrong, key=len), f"its graph fails on real values ({describe_exception(failure)})"
    if wrong:
        return wrong[0], "its graph returns other outputs than the module on the first calibration batch"
    if failure is not None:
        raise failure
    return None


def _digests_equal(first: Any, second: Any) -> bool:
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(_digests_equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, float):
        return math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-4) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


class _Search:
    """The search for islands.

    Attributes
    ----------
    refused : dict of str to str
        Modules that were called and are not one graph, with the reasons, by path below the shell.
    """

    def __init__(self, shell: nn.Module, calls: dict[str, RecordedCall]) -> None:
        self.shell, self.calls = shell, calls
        self.refused: dict[str, str] = {}

    def find(self, name: str) -> Iterator[Island]:
        """Yield the outermost traceable modules at or below a path, and those nested in their opaque parts."""
        if name in self.calls:
            module, call = self.shell.get_submodule(name), self.calls[name]
            constants = constant_arguments(module, [(call.args, call.kwargs), *call.later])
            traced = constants if isinstance(constants, Untraced) else trace_module(module, (), constants=constants)
            if isinstance(traced, Traced):
                opaque, print_ = tuple(sorted(traced.opaque)), fingerprint(traced.gm)
                yield Island(name, traced.gm, opaque, call, print_, traced.gm.meta[CONSTANT_ARGUMENTS])
                for path in sorted(traced.opaque):
                    part = join_path(name, path)
                    if part in self.calls:
                        self.refused[part] = traced.opaque[path]
                    yield from self.find_below(part)
                return
            self.refused[name] = traced.reason
        yield from self.find_below(name)

    def find_below(self, name: str) -> Iterator[Island]:
        """Yield the islands below a path, as `find` for each child."""
        for child, _ in self.shell.get_submodule(name).named_children():
            yield from self.find(join_path(name, child))

    def rejections(self) -> list[Rejection]:
        """Return the refused modules. Containers that are never called are not listed."""
        return [
            Rejection(_without_root(name) or "<model>", f"it is not one graph, so only its parts can go: {reason}")
            for name, reason in self.refused.items()
            if reason
        ]


def replace_module(model: nn.Module, name: str, new: nn.Module, functional: bool = True) -> None:
    """Replace a module by another one, under every path of it.

    The in-place flags of all layers that a new graph calls are cleared: after a bypass, a value can have readers later
    in the graph, and recorded values must not be overwritten. If `functional` is False, layers keep their flag if they
    are the only reader of a new value.
    """
    if isinstance(new, fx.GraphModule):
        for _, layer, harmless in in_place_layers(new):
            layer.inplace = bool(layer.inplace) and harmless and not functional  # type: ignore[assignment]
    old = model.get_submodule(name)
    for path in [path for path, module in model.named_modules(remove_duplicate=False) if path and module is old]:
        model.set_submodule(path, new)
