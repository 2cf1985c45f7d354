"""Observes the modules of a model in one run: what they return, what they overwrite, which weights gradients reach.

Values are kept as digests: nested tuples of structure, shapes, dtypes, sums and norms. So two runs can be compared
without keeping their tensors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fxprune.runtime.private_copy import preserve_rng_state, preserve_state, weights_require_gradients
from fxprune.runtime.torch_internals import tree_flatten, tree_leaves, write_count

UNKNOWN = object()
"""Digest of what differs between two runs of the same model. It equals every digest."""


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Attributes
    ----------
    name : str
        Path of the module.
    within : tuple of str
        Paths of the observed modules in whose calls it happened, outermost first.
    inputs
        Digest of its arguments before the call; None if they were not observed.
    output
        Digest of what it returned; None if it did not return.
    overwritten
        Digest of the tensors among its arguments that it overwrote, with their positions.
    """

    name: str
    within: tuple[str, ...]
    inputs: Any
    output: Any = None
    overwritten: Any = ()


@dataclass
class RunRecord:
    """What the observed modules did in one run.

    Attributes
    ----------
    calls : dict of str to list of Call
        The finished calls of each module, in order, by path.
    begun : list of Call
        Calls that had begun and had not ended, outermost first. Empty unless the run failed.
    failure : Exception or None
        The error that the run raised.
    result
        Digest of what the run returned.
    buffers : dict of str to digest
        Digest of each buffer after the run.
    reached
        Names of the weights that gradients of the result reach; empty if gradients were off.
    overwritten : set of str
        Modules whose output code outside them overwrote, as by ``y = block(x); y += x``. Only if outputs were watched.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    begun: list[Call] = field(default_factory=list)
    failure: Exception | None = None
    result: Any = None
    buffers: dict[str, Any] = field(default_factory=dict)
    reached: Any = frozenset()
    overwritten: set[str] = field(default_factory=set)


Tell = Callable[[str, Any, Any], None]
"""``(path, args, kwargs) -> None``."""


def ignore_call(name: str, args: Any, kwargs: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Watch:
    """What to observe in a run.

    Attributes
    ----------
    names : tuple of str
        Paths of the modules to observe.
    gradients : bool
        Whether gradients are on in the run, as if every weight required them.
    closely : bool
        Whether the digests of calls include their inputs, and a backward pass is run: weights with a gradient of 0 are
        not reached. Otherwise every weight is reached that a backward pass would come to.
    tell : callable
        Called before each call of a module.
    outputs : bool
        Whether the outputs of the modules are kept to the end of the run, to see which of them are overwritten.
    """

    names: tuple[str, ...]
    gradients: bool = False
    closely: bool = False
    tell: Tell = ignore_call
    outputs: bool = False


def observe(model: nn.Module, run: Callable[[nn.Module], Any], watch: Watch) -> RunRecord:
    """Run a model and observe some of its modules. An error of the run is part of the record.

    Random numbers are seeded. The model's buffers and attributes are restored, so that every run begins alike. Warnings
    are not shown, because the model is run again for its scores.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> record = observe(model, lambda network: network(torch.ones(1, 2)), Watch(("0",), gradients=True))
    >>> len(record.calls["0"]), sorted(record.reached)
    (1, ['0.bias', '0.weight'])
    """
    record = RunRecord()
    with ExitStack() as stack:
        stack.enter_context(preserve_state(model))
        stack.enter_context(preserve_rng_state(model))
        stack.enter_context(weights_require_gradients(model, watch.gradients))
        stack.enter_context(torch.set_grad_enabled(watch.gradients))
        for name in watch.names:
            stack.enter_context(_recording_hooks(model.get_submodule(name), name, record, watch))
        returned: list[tuple[str, Tensor, int]] = []
        for name in watch.names if watch.outputs else ():
            stack.callback(_keep_outputs(model.get_submodule(name), name, returned).remove)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            result = run(model)
        except Exception as error:  # a model can raise any error
            record.failure = error
            return record
        record.begun.clear()
        record.overwritten = {name for name, tensor, count in returned if write_count(tensor) != count}
        record.result = digest(result)
        record.buffers = {name: digest(buffer) for name, buffer in model.named_buffers()}
        if watch.gradients:
            record.reached = _reached_weights(model, result, watch.closely)
    return record


def _keep_outputs(module: nn.Module, name: str, returned: list[tuple[str, Tensor, int]]) -> RemovableHandle:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        returned.extend((name, leaf, write_count(leaf)) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    return module.register_forward_hook(keep)


@contextmanager
def _recording_hooks(module: nn.Module, name: str, record: RunRecord, watch: Watch) -> Iterator[None]:
    written: list[tuple[Call, list[tuple[Tensor, int]]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.tell(name, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outer = tuple(call.name for call in record.begun)
        call = Call(name, outer, digest((args, kwargs)) if watch.closely else None)
        record.begun.append(call)
        written.append((call, [(tensor, write_count(tensor)) for tensor in tensors]))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        while record.begun[-1].name != name:  # calls that raised an error which the model caught
            record.begun.pop()
        call = record.begun.pop()
        while written[-1][0] is not call:
            written.pop()
        _, tensors = written.pop()
        changed = [(i, digest(tensor)) for i, (tensor, count) in enumerate(tensors) if write_count(tensor) != count]
        record.calls.setdefault(name, []).append(replace(call, output=digest(output), overwritten=changed))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reached_weights(model: nn.Module, result: Any, backward: bool) -> frozenset[str]:
    """Return the names of the weights that gradients of a value reach, with a backward pass or without one."""
    leaves = [leaf for leaf in tree_leaves(result) if _has_gradient(leaf)]
    reached = _weights_behind(model, leaves)
    if not backward or not reached:
        return reached
    before = {weight: weight.grad for weight in model.parameters()}
    try:
        for weight in before:
            weight.grad = None
        torch.autograd.backward([leaf.sum() for leaf in leaves])
        sizes = {name: _largest(weight.grad) for name, weight in model.named_parameters()}
        return frozenset(name for name, size in sizes.items() if size > 1e-7 * max(sizes.values()))
    except Exception:  # a backward pass can raise any error; then it says nothing
        return reached
    finally:
        for weight, gradient in before.items():
            weight.grad = gradient


def _largest(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None or not gradient.numel() else float(gradient.detach().abs().max())


def _weights_behind(model: nn.Module, leaves: list[Tensor]) -> frozenset[str]:
    """Return the names of the weights in the autograd graph of some tensors. Nothing is computed."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    waiting = [get_gradient_edge(leaf).node for leaf in leaves]
    seen, found = set(waiting), set[str]()
    while waiting:
        node = waiting.pop()
        weight = getattr(node, "variable", None)  # only the node that adds to a leaf's gradient has one
        found |= {names[id(weight)]} if id(weight) in names else set()
        fresh = {further for further, _ in node.next_functions if further is not None} - seen
        seen |= fresh
        waiting += fresh
    return frozenset(found)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def digest(value: Any, depth: int = 2) -> Any:
    """Return the structure of a value, and shape, dtype, sum and norm of every tensor in it.

    Examples
    --------
    >>> digest([torch.ones(2), 3]) == digest([torch.ones(2), 3]), digest([torch.ones(2)]) == digest([torch.zeros(2)])
    (True, False)
    """
    leaves, structure = tree_flatten(value)
    return str(structure), tuple(_leaf_digest(leaf, depth) for leaf in leaves)


def _leaf_digest(leaf: Any, depth: int) -> Any:
    if isinstance(leaf, Tensor):
        numbers = leaf.detach().float()
        moments = torch.stack([numbers.sum(), torch.linalg.vector_norm(numbers)]).tolist()
        return tuple(leaf.shape), leaf.dtype, *moments
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
        return leaf
    kind = type(leaf).__qualname__
    if depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)) and not callable(leaf):
        return kind, digest(dict(vars(leaf)), depth - 1)
    return kind


def equal(first: Any, second: Any) -> bool:
    """Whether two digests are equal, up to rounding.

    Examples
    --------
    >>> equal((1.0, "a"), (1.0 + 1e-9, "a")), equal((1.0, "a"), (1.1, "a"))
    (True, False)
    """
    if first is UNKNOWN or second is UNKNOWN:
        return True
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-4) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


def reproducible(first: RunRecord, second: RunRecord) -> RunRecord:
    """Return what two records of one run have in common; `UNKNOWN` replaces what differs.

    The inputs of calls, and the reached weights, are those of the second. Modules with different numbers of calls are
    left out.
    """
    calls = {}
    for name, mine in first.calls.items():
        others = second.calls.get(name, mine)
        if len(mine) == len(others):
            calls[name] = list(map(_common_call, mine, others))
    return RunRecord(
        calls=calls,
        result=_common(first.result, second.result),
        buffers={name: _common(value, second.buffers.get(name)) for name, value in first.buffers.items()},
        reached=second.reached,
    )


def _common(first: Any, second: Any) -> Any:
    return first if equal(first, second) else UNKNOWN


def _common_call(first: Call, second: Call) -> Call:
    output, overwritten = _common(first.output, second.output), _common(first.overwritten, second.overwritten)
    return replace(second, output=output, overwritten=overwritten)
