"""Runs a model (teacher) and its pruned version (student) on the same images and records their features.

Modules that both have in common have the same dotted paths. Decisions between the islands, such as the proposals of an
eager detector, carry no gradient. The student gets the teacher's decisions: otherwise the features would belong to
different boxes and could not be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch, select_items
from fxprune.graph.fx_utils import is_within, map_tensors
from fxprune.runtime.torch_internals import tree_leaves

Hook = Callable[[str, nn.Module, tuple[Any, ...], Any], Any]
"""``hook(path, module, arguments, output) -> new output, or None`` to keep the output."""


@dataclass(frozen=True)
class TeacherStudent:
    """Private copies of a model and of its pruned version.

    Attributes
    ----------
    teacher, student : Module
        The original and the pruned model. Healing changes the student.
    adapter : Adapter
        Runs both.
    detached_modules : tuple of str
        Modules between the islands whose inputs carry gradients, but whose outputs do not.
    calls : mapping of str to int
        Number of calls per module, on the batch of `pair_models`. Only modules that both models call equally often.
    graphs : tuple of str
        Outermost islands, also those without removals; "" is the whole model.
    """

    teacher: nn.Module
    student: nn.Module
    adapter: Adapter
    detached_modules: tuple[str, ...]
    calls: Counter[str] = field(repr=False)
    graphs: tuple[str, ...]

    def select(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """Return the images of a batch with these numbers, and their targets if it has any."""
        targets = None if batch.targets is None else self.adapter.select_targets(self.teacher, batch, numbers)
        return replace(batch, images=select_items(batch.images, numbers), targets=targets, count=len(numbers))

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the student's leaf modules, with paths, that lie in an island and have an entry in `calls`."""
        for name, module in self.student.named_modules():
            if self.calls[name] and is_within(name, self.graphs) and not any(True for _ in module.children()):
                yield name, module


def pair_models(
    original: nn.Module, pruned: nn.Module, adapter: Adapter, batch: Batch, islands: Collection[str]
) -> TeacherStudent:
    """Run both models on one batch and return them as a pair.

    Parameters
    ----------
    original, pruned : Module
        Private copies.
    adapter : Adapter
    batch : Batch
        Normalized by the adapter.
    islands : collection of str
        Paths of the islands.

    Returns
    -------
    TeacherStudent

    Examples
    --------
    >>> pair = pair_models(teacher, student, adapter, batch, [""])   # doctest: +SKIP
    """
    outermost = tuple(
        name for name in sorted(islands) if not is_within(name, [other for other in islands if other != name])
    )
    known = {name for name, _ in pruned.named_modules()}
    between = [name for name, _ in original.named_modules() if name and not is_within(name, outermost)]
    calls: Counter[str] = Counter()
    decisions: dict[str, None] = {}

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        if name in between and _tensors(output) and any(value.requires_grad for value in _tensors(args)):
            if not any(value.requires_grad for value in _tensors(output)):
                decisions[name] = None
            else:
                decisions.pop(name, None)

    shared = [name for name, _ in original.named_modules() if name in known or name in between]
    with forward_hooks(original, shared, record), torch.enable_grad(), with_gradients(original):
        adapter.predict(original, batch)
    student_calls: Counter[str] = Counter()

    def count(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        student_calls[name] += 1

    with forward_hooks(pruned, [name for name in shared if name in known], count), torch.no_grad():
        adapter.predict(pruned, batch)  # a graph calls fewer modules than the original code
    both = Counter({name: times for name, times in calls.items() if student_calls[name] == times})
    return TeacherStudent(original, pruned, adapter, tuple(decisions), both, outermost)


@contextmanager
def with_gradients(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Set `requires_grad` of all floating point weights until the end of the block. Yields these weights."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
            weight.grad = None


@contextmanager
def forward_hooks(model: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """Call `hook` with each output of the named modules. Its result, unless None, replaces the output."""

    def bind(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        return lambda module, args, output: hook(name, module, args, output)

    handles = [model.get_submodule(name).register_forward_hook(bind(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FeatureRecorder:
    """Records the outputs of modules during one run of a model, per call.

    Parameters
    ----------
    points : sequence of str
        Modules whose outputs are recorded.
    detached_modules : sequence of str
        Modules whose outputs are also recorded, and replaced by those of `reference` if it is given.
    reference : FeatureRecorder or None
        Recorder of the teacher's run.
    """

    def __init__(
        self, points: Sequence[str], detached_modules: Sequence[str], reference: FeatureRecorder | None = None
    ) -> None:
        self.points, self.detached_modules, self.reference = points, detached_modules, reference
        self.values: dict[tuple[str, int], list[Tensor]] = {}
        self.detached_values: dict[tuple[str, int], Any] = {}
        self._count: Counter[str] = Counter()

    def run(self, model: nn.Module, adapter: Adapter, batch: Batch) -> FeatureRecorder:
        """Run a model. With `reference`, stop when all outputs that it recorded are recorded here too."""
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
        return map_tensors(output, torch.clone)  # the next operation may overwrite it in place

    def _keep_detached(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._call(f"{name} decides")
        self.detached_values[call] = output
        return None if self.reference is None else self.reference.detached_values.get(call)

    def _call(self, name: str) -> tuple[str, int]:
        self._count[name] += 1
        return name, self._count[name]


class StopForward(BaseException):
    """Ends a run of a model when all needed outputs are recorded."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
