"""A model as it was and a pruned version of it, run side by side on the same images.

What the two have in common goes by the same dotted paths. What an eager detector *decides* on the way (which proposals
to look at) carries no gradient; the pruned one is given the original's decisions, or their features would be of
different boxes and could not be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch
from fxprune.graph.fx_utils import is_within, map_tensors
from fxprune.runtime.torch_internals import tree_leaves

Hook = Callable[[str, nn.Module, tuple[Any, ...], Any], Any]
"""``hook(path, module, arguments, output) -> what to give instead, or None``."""


@dataclass(frozen=True)
class TeacherStudent:
    """Private copies of a model and of its pruned version.

    Attributes
    ----------
    teacher, student : Module
        The pruned one is what is healed.
    adapter : Adapter
        How to run them.
    detached_modules : tuple of str
        Modules between the graphs whose outputs carry no gradient although what they are given does.
    calls : mapping of str to int
        How often each module is called that both versions call, and as often, on the batch they were looked at with.
    graphs : tuple of str
        Parts that were captured as one graph, outermost ones, whether anything was removed from them or not; "" is the
        whole model.
    """

    teacher: nn.Module
    student: nn.Module
    adapter: Adapter
    detached_modules: tuple[str, ...]
    calls: Counter[str] = field(repr=False)
    graphs: tuple[str, ...]

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Innermost modules within the captured parts that both versions have and the original called."""
        for name, module in self.student.named_modules():
            if self.calls[name] and is_within(name, self.graphs) and not any(True for _ in module.children()):
                yield name, module


def pair_models(
    original: nn.Module, pruned: nn.Module, adapter: Adapter, batch: Batch, islands: Collection[str]
) -> TeacherStudent:
    """Look at how the original runs on one batch.

    Parameters
    ----------
    original, pruned : Module
        Private copies.
    adapter : Adapter
    batch : Batch
        Prepared for the adapter.
    islands : collection of str
        Parts that were captured as one graph.
    """
    outermost = tuple(
        name for name in sorted(islands) if not is_within(name, [other for other in islands if other != name])
    )
    known = {name for name, _ in pruned.named_modules()}
    between = [name for name, _ in original.named_modules() if name and not is_within(name, outermost)]
    calls: Counter[str] = Counter()
    decisions: dict[str, None] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        if name in between and _tensors(output) and any(value.requires_grad for value in _tensors(args)):
            if not any(value.requires_grad for value in _tensors(output)):
                decisions[name] = None
            else:
                decisions.pop(name, None)

    shared = [name for name, _ in original.named_modules() if name in known or name in between]
    with forward_hooks(original, shared, look), torch.enable_grad(), with_gradients(original):
        adapter.predict(original, batch)
    again: Counter[str] = Counter()

    def count(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        again[name] += 1

    with forward_hooks(pruned, [name for name in shared if name in known], count), torch.no_grad():
        adapter.predict(pruned, batch)  # a graph calls fewer modules than the program it was traced from
    both = Counter({name: times for name, times in calls.items() if again[name] == times})
    return TeacherStudent(original, pruned, adapter, tuple(decisions), both, outermost)


@contextmanager
def with_gradients(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let all weights of a model take gradients until the end of the block; yields them."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight, takes in zip(weights, before, strict=True):
            weight.requires_grad_(takes)
            weight.grad = None


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no weight of a model take gradients until the end of the block: what is in between may, at less cost."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        for weight, _ in before:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, takes in before:
            weight.requires_grad_(takes)


@contextmanager
def forward_hooks(model: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """Call a function with the output of each of some modules; what it returns, unless None, is given instead."""

    def bind(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        return lambda module, args, output: hook(name, module, args, output)

    handles = [model.get_submodule(name).register_forward_hook(bind(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FeatureRecorder:
    """Outputs of some modules, kept as a model runs, call by call.

    Parameters
    ----------
    points : sequence of str
        Modules whose outputs are kept.
    detached_modules : sequence of str
        Modules whose outputs are kept, or replaced by those that another run kept.
    reference : Features or None
        That run.
    """

    def __init__(
        self, points: Sequence[str], detached_modules: Sequence[str], reference: FeatureRecorder | None = None
    ) -> None:
        self.points, self.detached_modules, self.reference = points, detached_modules, reference
        self.values: dict[tuple[str, int], list[Tensor]] = {}
        self.detached_values: dict[tuple[str, int], Any] = {}
        self._count: Counter[str] = Counter()

    def run(self, model: nn.Module, adapter: Adapter, batch: Batch) -> FeatureRecorder:
        """Run a model; with `reference`, stop when it has given what they have."""
        try:
            with (
                forward_hooks(model, self.points, self._keep),
                forward_hooks(model, self.detached_modules, self._keep_detached),
            ):
                adapter.predict(model, batch)
        except StopForward:
            pass
        return self

    def _keep(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.values[self._call(name)] = _tensors(output)
        if self.reference is not None and self.values.keys() >= self.reference.values.keys():
            raise StopForward
        return map_tensors(output, torch.clone)  # what comes next may overwrite it

    def _keep_detached(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._call(f"{name} decides")
        self.detached_values[call] = output
        return None if self.reference is None else self.reference.detached_values.get(call)

    def _call(self, name: str) -> tuple[str, int]:
        self._count[name] += 1
        return name, self._count[name]


class StopForward(BaseException):
    """Ends a run that has given all that is wanted of it."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
