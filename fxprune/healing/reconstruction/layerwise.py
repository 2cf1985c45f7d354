"""Fits the layers of a pruned model in closed form to their new inputs, layer by layer in one pass.

All calibration batches run in lockstep through the original and the pruned model. If the output of a layer differs from
that in the original, its parameters are fitted to all batches at once, and all runs continue with the fitted layer.
Only existing parameters are fitted, so healing adds no cost at inference.
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
from fxprune.graph.fx_utils import full_precision
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
"""Values of all runs at a point, by role (``"original"``, ``"pruned"``) and batch number."""


def reconstruct_layers(
    pair: TeacherStudent,
    batches: Sequence[Batch],
    fit: Fit,
    progress: Callable[[str], None] = lambda layer: None,
    saliency: Sequence[Maps] = (),
) -> list[str]:
    """Fit every layer of a pruned model whose output differs from that in the original, in execution order.

    Parameters
    ----------
    pair : TeacherStudent
        The student is changed.
    batches : sequence of Batch
        This process's share of the calibration batches, at least one. Fits use the batches of all processes.
    fit : callable
        See `Fit`.
    progress : callable
        Called with the path of each layer that was compared.
    saliency : sequence of Maps
        Weights of the positions of the original's features, per batch. Without them, all weights are equal.

    Returns
    -------
    list of str
        Paths of the fitted layers.

    Examples
    --------
    >>> reconstruct_layers(pair, batches, fit_layer)     # doctest: +SKIP
    ['backbone.layer3.0.conv1', 'backbone.layer3.0.bn1']
    """
    state = _LayerwisePass(pair, fit, progress, saliency)
    runs = {("original", index): state.run(pair.teacher, batch) for index, batch in enumerate(batches)}
    runs |= {("pruned", index): state.run(pair.student, batch) for index, batch in enumerate(batches)}
    with ExitStack() as hooks, torch.no_grad():
        for model in (pair.teacher, pair.student):
            hooks.enter_context(forward_hooks(model, state.layers, state.observe))
            hooks.enter_context(forward_hooks(model, pair.detached_modules, state.replay))
        with raise_on_all_ranks() as state.exchange_errors:
            run_lockstep(runs, state.fit_when_all_arrived)
    return list(state.fitted)


class _LayerwisePass:
    """State of one lockstep pass over a pair."""

    def __init__(
        self, pair: TeacherStudent, fit: Fit, progress: Callable[[str], None], saliency: Sequence[Maps]
    ) -> None:
        self.pair, self.fit, self.progress, self.saliency = pair, fit, progress, saliency
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
        def predict(meet: Rendezvous) -> None:
            self.thread_state.meet, self.thread_state.calls = meet, Counter()
            self.pair.adapter.predict(model, batch)

        return predict

    def observe(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Wait with the input and output of a layer. If the layer is fitted there, return its new output."""
        point = self._next_point(name)
        if not isinstance(output, Tensor) or not isinstance(args[0] if args else None, Tensor):
            return None
        return module.forward(*args) if self.thread_state.meet(point, (args[0], output)) else None

    def replay(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output of a detached module in the original, in the runs of the pruned model."""
        return self.thread_state.meet(self._next_point(name), output)

    def _next_point(self, name: str) -> tuple[str, int]:
        self.thread_state.calls[name] += 1
        return name, self.thread_state.calls[name]

    def fit_when_all_arrived(self, point: tuple[str, int], values: PointValues) -> PointValues:
        """Fit the layer at which all runs wait. Returns, per run of the pruned model, whether the layer was changed."""
        name, numbers = point[0], [index for role, index in values if role == "pruned"]
        if name in self.pair.detached_modules:
            return {("pruned", index): values["original", index] for index in numbers}
        self.exchange_errors()
        self.progress(name)
        values = {run: tuple(map(full_precision, pair)) for run, pair in values.items()}
        if any(name == term.observed_at for term in self.residual_operands.values()):
            self.observed[name] = values
        inputs, outputs = ([values["pruned", index][part] for index in numbers] for part in (0, 1))
        targets = self._targets(name, values, numbers)
        changed = self._fit_point(
            point, inputs, targets, name in self.fitted or _deviation(outputs, targets) > UNCHANGED_DEVIATION
        )
        if changed:
            self.fitted[name] = None
            for index in numbers if name in self.observed else ():
                x = values["pruned", index][0]
                self.observed[name]["pruned", index] = (x, self.layers[name].forward(x))
        return {("pruned", index): changed for index in numbers}

    def _fit_point(self, point: tuple[str, int], inputs: list[Tensor], targets: list[Tensor], changed: bool) -> bool:
        """Fit a layer if its output has changed. If more calls follow, its sums are updated in any case."""
        (name, call), layer = point, self.layers[point[0]]
        sums = self.sums.setdefault(name, {})
        if call == self.pair.calls[name]:
            del self.sums[name]
            if not changed:
                return False
        before = [value.clone() for value in (*layer.parameters(), *layer.buffers())]
        self.fit(layer, LayerRows(inputs, targets, changed, sums, self._position_weights(point, targets)))
        after = (*layer.parameters(), *layer.buffers())
        return any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def _position_weights(self, point: tuple[str, int], targets: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the weights of the positions of a layer's output; None unless they are known for all batches."""
        layer, known = self.layers[point[0]], [maps[point][0] for maps in self.saliency if point in maps]
        positions = [value.numel() // value.shape[channel_dim(layer, value)] for value in targets]
        found = [weights for weights in known if weights is not None]
        return found if [weights.numel() for weights in found] == positions else None

    def _targets(self, name: str, values: PointValues, numbers: Sequence[int]) -> list[Tensor]:
        """Return the outputs that a layer should have: those in the original.

        If a sum adds the output to another operand, the change of that operand is subtracted: so the fit keeps the sum.
        """
        term = self.residual_operands.pop(name, None)
        targets = [values["original", index][1] for index in numbers]
        if term is None:
            return targets
        part = 0 if term.is_input else 1
        observed = self.observed[term.observed_at]
        missing = [observed["original", index][part] - observed["pruned", index][part] for index in numbers]
        if not any(other.observed_at == term.observed_at for other in self.residual_operands.values()):
            del self.observed[term.observed_at]
        if term.norm is not None:
            scale = _norm_scale(self.pair.student.get_submodule(term.norm))
            missing = [value / scale.reshape(-1, 1, 1) for value in missing] if scale is not None else []
        pairs = zip(targets, missing, strict=False)
        return [target + value for target, value in pairs if target.shape == value.shape] or targets


def _norm_scale(norm: nn.Module) -> Tensor | None:
    """Return the scale of each channel in a norm in eval mode; None if it depends on the input or is almost zero."""
    variance, weight = getattr(norm, "running_var", None), getattr(norm, "weight", None)
    if variance is None or weight is None:
        return None
    scale: Tensor = weight.detach() / (variance + norm.eps).sqrt()
    return scale if bool((scale.abs() > 1e-3 * scale.abs().max()).all()) else None


def _is_shared(pair: TeacherStudent, layer: nn.Module) -> bool:
    """Whether another layer has weights of this layer."""
    own = {id(weight) for weight in layer.parameters()}
    owners = [
        module for module in pair.student.modules() if own & {id(value) for value in module.parameters(recurse=False)}
    ]
    return len(owners) > 1


def _deviation(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Return the relative deviation of outputs from targets (root of the ratio of mean squares), all processes."""
    pairs = zip(outputs, targets, strict=True)
    parts = [torch.stack([(new - old).double().square().sum(), old.double().square().sum()]) for new, old in pairs]
    off, size = all_reduce_sum(torch.stack(parts).sum(0)).tolist()
    return float((off / size) ** 0.5) if size > 0 else 0.0
