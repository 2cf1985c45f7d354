"""Healing in closed form: what layers hold is fitted anew to what now reaches them, layer after layer in one pass.

All calibration batches run in step, the model as it was beside the pruned one. Where they come to a layer that no
longer gives what it gave, its parameters are fitted to all of them at once, and all go on with the layer as it is then.
What is fitted are parameters that are there already: healing costs nothing at run time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Batch
from fxprune.graph.operators import channel_dim
from fxprune.healing.reconstruction.least_squares import Fit, LayerRows
from fxprune.healing.reconstruction.lockstep import Rendezvous, run_lockstep
from fxprune.healing.reconstruction.residual_adds import find_residual_operands
from fxprune.healing.saliency import Maps
from fxprune.healing.teacher_student import TeacherStudent, forward_hooks
from fxprune.runtime.distributed import all_reduce_sum, raise_on_all_ranks

UNCHANGED_DEVIATION = 1e-5
"""Relative deviation (root of mean squares) below which a layer's output counts as unchanged."""

PointValues = dict[tuple[str, int], Any]
"""What runs have at a point, by role (``original``, ``pruned``) and number of the batch."""


def reconstruct_layers(
    pair: TeacherStudent,
    batches: Sequence[Batch],
    fit: Fit,
    tell: Callable[[str], None] = lambda layer: None,
    saliency: Sequence[Maps] = (),
) -> list[str]:
    """Fit every layer of a pruned model that gives something else than it did, in the order they run.

    Parameters
    ----------
    pair : Pair
        Its pruned model is changed.
    batches : sequence of Batch
        This process's share of the calibration batches, at least one; fits see those of all processes.
    fit : callable
        See `Fit`.
    tell : callable
        Told each layer that was looked at.
    saliency : sequence of Maps
        How much the places of the original's features count, batch by batch; without it all count alike.

    Returns
    -------
    list of str
        Layers that were fitted.
    """
    work = _LayerwisePass(pair, fit, tell, saliency)
    runs = {("original", index): work.run(pair.teacher, batch) for index, batch in enumerate(batches)}
    runs |= {("pruned", index): work.run(pair.student, batch) for index, batch in enumerate(batches)}
    with ExitStack() as hooks, torch.no_grad():
        for model in (pair.teacher, pair.student):
            hooks.enter_context(forward_hooks(model, work.layers, work.observe))
            hooks.enter_context(forward_hooks(model, pair.detached_modules, work.replay))
        with raise_on_all_ranks() as work.exchange_errors:
            run_lockstep(runs, work.fit_when_all_arrived)
    return list(work.fitted)


class _LayerwisePass:
    """One pass in step over a pair."""

    def __init__(self, pair: TeacherStudent, fit: Fit, tell: Callable[[str], None], saliency: Sequence[Maps]) -> None:
        self.pair, self.fit, self.tell, self.saliency = pair, fit, tell, saliency
        self.layers = {name: layer for name, layer in pair.layers() if not _is_shared(pair, layer)}
        once = {name for name in self.layers if pair.calls[name] == 1}
        self.residual_operands = {
            name: term
            for name, term in find_residual_operands(pair.student).items()
            if {name, term.observed_at} <= once
        }
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.observed: dict[str, PointValues] = {}
        self.thread_state = local()
        self.fitted: dict[str, None] = {}
        self.exchange_errors: Callable[[], None] = lambda: None

    def run(self, model: nn.Module, batch: Batch) -> Callable[[Rendezvous], None]:
        def work(meet: Rendezvous) -> None:
            self.thread_state.meet, self.thread_state.calls = meet, Counter()
            self.pair.adapter.predict(model, batch)

        return work

    def observe(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Let a layer's output be seen; give what it gives once it was fitted."""
        point = self._next_point(name)
        if not isinstance(output, Tensor) or not isinstance(args[0] if args else None, Tensor):
            return None
        return module.forward(*args) if self.thread_state.meet(point, (args[0], output)) else None

    def replay(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Give what the model as it was decided here."""
        return self.thread_state.meet(self._next_point(name), output)

    def _next_point(self, name: str) -> tuple[str, int]:
        self.thread_state.calls[name] += 1
        return name, self.thread_state.calls[name]

    def fit_when_all_arrived(self, point: tuple[str, int], values: PointValues) -> PointValues:
        """Fit the layer that all runs have come to; those of the pruned model are told whether it changed."""
        name, numbers = point[0], [index for role, index in values if role == "pruned"]
        if name in self.pair.detached_modules:
            return {("pruned", index): values["original", index] for index in numbers}
        self.exchange_errors()
        self.tell(name)
        if any(name == term.observed_at for term in self.residual_operands.values()):
            self.observed[name] = values
        inputs, outputs = ([values["pruned", index][part] for index in numbers] for part in (0, 1))
        wanted = self._targets(name, values, numbers)
        changed = self._fit_point(
            point, inputs, wanted, name in self.fitted or _deviation(outputs, wanted) > UNCHANGED_DEVIATION
        )
        if changed:
            self.fitted[name] = None
            for index in numbers if name in self.observed else ():
                x = values["pruned", index][0]
                self.observed[name]["pruned", index] = (x, self.layers[name].forward(x))
        return {("pruned", index): changed for index in numbers}

    def _fit_point(self, point: tuple[str, int], inputs: list[Tensor], wanted: list[Tensor], changed: bool) -> bool:
        """Fit a layer if it gives something else; the calls of one that is called again are added up in any case."""
        (name, call), layer = point, self.layers[point[0]]
        sums = self.sums.setdefault(name, {})
        if call == self.pair.calls[name]:
            del self.sums[name]
            if not changed:
                return False
        before = [value.clone() for value in (*layer.parameters(), *layer.buffers())]
        self.fit(layer, LayerRows(inputs, wanted, changed, sums, self._place_weights(point, wanted)))
        after = (*layer.parameters(), *layer.buffers())
        return any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def _place_weights(self, point: tuple[str, int], wanted: Sequence[Tensor]) -> list[Tensor] | None:
        """How much places of a layer's output count, where that is known of all of them."""
        layer, known = self.layers[point[0]], [maps[point][0] for maps in self.saliency if point in maps]
        places = [value.numel() // value.shape[channel_dim(layer, value)] for value in wanted]
        found = [weights for weights in known if weights is not None]
        return found if [weights.numel() for weights in found] == places else None

    def _targets(self, name: str, values: PointValues, numbers: Sequence[int]) -> list[Tensor]:
        """What a layer should give: what it gave, and in a sum also what the other operand no longer has."""
        term = self.residual_operands.pop(name, None)
        wanted = [values["original", index][1] for index in numbers]
        if term is None:
            return wanted
        part = 0 if term.is_input else 1
        seen = self.observed[term.observed_at]
        missing = [seen["original", index][part] - seen["pruned", index][part] for index in numbers]
        if not any(other.observed_at == term.observed_at for other in self.residual_operands.values()):
            del self.observed[term.observed_at]
        if term.norm is not None:
            scale = _norm_scale(self.pair.student.get_submodule(term.norm))
            missing = [lack / scale.reshape(-1, 1, 1) for lack in missing] if scale is not None else []
        pairs = zip(wanted, missing, strict=False)
        return [value + lack for value, lack in pairs if value.shape == lack.shape] or wanted


def _norm_scale(norm: nn.Module) -> Tensor | None:
    """What a norm in eval mode multiplies each channel by; None if that depends on the input, or is about zero."""
    variance, weight = getattr(norm, "running_var", None), getattr(norm, "weight", None)
    if variance is None or weight is None:
        return None
    scale: Tensor = weight.detach() / (variance + norm.eps).sqrt()
    return scale if bool((scale.abs() > 1e-3 * scale.abs().max()).all()) else None


def _is_shared(pair: TeacherStudent, layer: nn.Module) -> bool:
    """Whether a layer's weights are another layer's too."""
    own = {id(weight) for weight in layer.parameters()}
    owners = [
        module for module in pair.student.modules() if own & {id(value) for value in module.parameters(recurse=False)}
    ]
    return len(owners) > 1


def _deviation(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = zip(given, wanted, strict=True)
    parts = [torch.stack([(new - old).double().square().sum(), old.double().square().sum()]) for new, old in pairs]
    off, size = all_reduce_sum(torch.stack(parts).sum(0)).tolist()
    return float((off / size) ** 0.5) if size > 0 else 0.0
