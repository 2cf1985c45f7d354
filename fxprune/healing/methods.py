"""Methods of healing: what each does to a pruned model, how far it goes, and what it notes of that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.custom_loss import Loss
from fxprune.adapters.protocol import Batch
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.distillation.feature_mimic import (
    check_shareable_images,
    hold_out,
    is_shareable,
    split_batch,
    train_mimic,
)
from fxprune.healing.distillation.schedule import Schedule, copy_state
from fxprune.healing.loss_change import LossChange
from fxprune.healing.reconstruction.layerwise import reconstruct_layers
from fxprune.healing.reconstruction.least_squares import QUICK_EFFORT, fit_layer
from fxprune.healing.saliency import Maps, saliency_maps
from fxprune.healing.teacher_student import TeacherStudent
from fxprune.runtime.distributed import gather_shards, raise_on_all_ranks, rank_and_world, run_on_rank_zero, take_shard
from fxprune.runtime.json_text import replace_nonfinite
from fxprune.runtime.options import check_choice
from fxprune.runtime.progress import Progress, no_progress

Note = dict[str, Any]
NumberedBatch = tuple[int, Batch]  # a batch, or a piece of one, with the batch's number
INTERPOLATIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How far to go from the weights as they were to those that were fitted or trained; held-out images decide."""


@dataclass(frozen=True)
class HealingOptions:
    """How a pruned model is healed; see `fxprune.heal`.

    Raises
    ------
    SettingError
        If one is not known, or is no such number.
    """

    method: str = "mimic"
    steps: int = 400
    learning_rate: float = 2e-3
    seed: int = 0
    loss: Loss | None = None
    progress: Progress = field(default=no_progress, repr=False)

    def __post_init__(self) -> None:
        check_choice("heal", self.method, METHODS)
        self.schedule()

    def schedule(self) -> Schedule:
        """Return the schedule of the training."""
        return Schedule(self.steps, self.learning_rate, self.seed)


@dataclass(frozen=True)
class HealingContext:
    """What a healing method works with: its settings, where progress goes, whether to judge and note what it did, and
    the saliency of this process's batches once it is known, which serves other cuts of the same model too."""

    schedule: Schedule = field(default_factory=Schedule)
    progress: Progress = no_progress
    final: bool = False
    saliency: list[Maps] = field(default_factory=list)

    def make_counter(self, stage: str, total: int | None) -> Callable[..., None]:
        """A function that counts: each call is one more done of a stage."""
        counted = itertools.count(1)
        return lambda *_: self.progress(stage, next(counted), total)


class HealingRun:
    """A pruned model that is being healed, from some images, and judged by others.

    Parameters
    ----------
    pair : Pair
        Its pruned model is changed.
    batches : sequence of Batch
        As the adapter runs them; the same in all processes.
    context : Care

    Attributes
    ----------
    training, held_out : list of (int, Batch)
        What is learnt from (all where that is too little), and what is held out to judge by.
    initial_state : dict
        The weights as they were.
    """

    def __init__(self, pair: TeacherStudent, batches: Sequence[Batch], context: HealingContext) -> None:
        self.pair, self.batches, self.context = pair, batches, context
        whole = [(index, piece) for index, batch in enumerate(batches) for piece in split_batch(batch)]
        self.held_out, learnt = hold_out(whole)
        self.training = learnt if len(learnt) >= rank_and_world()[1] else list(enumerate(batches))
        self.initial_state = copy_state(pair.student)

    @cached_property
    def distance(self) -> FeatureDistance:
        """How far features are off, by their variances in what is learnt from."""
        return FeatureDistance(self.pair, [piece for _, piece in self.training])

    @cached_property
    def loss_change(self) -> LossChange:
        """Who takes the loss on what is held out."""
        pair, own = self.pair, take_shard(self.held_out)
        original = AdaptedModel(pair.teacher, pair.adapter, self.context.schedule.seed)
        return LossChange(original, [(index, original.label(piece)) for index, piece in own])

    def feature_distance(self) -> float:
        """How far features are off on what is held out; no number where processes cannot share that out."""
        held = [piece for _, piece in self.held_out]
        shared = all(is_shareable(piece) for _, piece in [*self.training, *self.held_out])
        return self.distance.mean(held) if shared else math.nan

    def fit_layers(self, batches: Sequence[NumberedBatch]) -> None:
        """Fit layer after layer, salient places counting for more."""
        own, care = take_shard(batches), self.context
        if not care.saliency:
            with raise_on_all_ranks():
                seed = care.schedule.seed
                care.saliency.extend(saliency_maps(self.pair, batch, index, seed) for index, batch in own)
        fit = fit_layer if care.final else partial(fit_layer, effort=QUICK_EFFORT)
        reconstruct_layers(
            self.pair, [batch for _, batch in own], fit, care.make_counter("affine", None), care.saliency
        )

    def interpolate(self) -> Note:
        """Go from the weights as they were to those that there are as far as brings the loss nearest to what it was.

        Returns how far that is, and how far off the loss was and is then, see `LossChange.deviation`.
        """
        end, losses = copy_state(self.pair.student), {}
        for share in INTERPOLATIONS:
            self.pair.student.load_state_dict(_interpolate_state(self.initial_state, end, share))
            losses[share] = self.loss_change.deviation(self.pair.student)
        best = min(INTERPOLATIONS, key=losses.__getitem__)
        self.pair.student.load_state_dict(_interpolate_state(self.initial_state, end, best))
        return {"share": best, "loss": replace_nonfinite({"before": losses[INTERPOLATIONS[-1]], "after": losses[best]})}


def run_method(method: str, healing: HealingRun) -> Note:
    """Heal, and say what was done and how far features were and are from the original's, on images held out."""
    begin, thorough = perf_counter(), healing.context.final
    before = healing.feature_distance() if thorough else math.nan
    done = METHODS[method](healing)
    after = healing.feature_distance() if thorough else math.nan
    return {
        "method": method,
        "images": sum(batch.count for batch in healing.batches),
        **done,
        "distance": replace_nonfinite({"before": before, "after": after}),
        "seconds": run_on_rank_zero(lambda: round(perf_counter() - begin, 1)),
    }


def _affine(healing: HealingRun) -> Note:
    if not healing.context.final:
        healing.fit_layers(list(enumerate(healing.batches)))
        return {}
    healing.fit_layers(healing.training)
    return healing.interpolate()


def _mimic(healing: HealingRun) -> Note:
    check_shareable_images(healing.batches)
    healing.fit_layers(healing.training)
    healing.interpolate()
    care = healing.context
    learnt, held = ([piece for _, piece in part] for part in (healing.training, healing.held_out))
    saliency = gather_shards(care.saliency, len(learnt))
    train_mimic(healing.distance, learnt, held, care.schedule, partial(care.progress, "mimic"), saliency)
    return {**healing.interpolate(), "steps": care.schedule.steps}


def _interpolate_state(start: dict[str, Any], end: dict[str, Any], share: float) -> dict[str, Any]:
    real = {name for name, value in end.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: torch.lerp(start[name], value, share) if name in real else value for name, value in end.items()}


METHODS: dict[str, Callable[[HealingRun], Note]] = {
    "none": lambda healing: {},
    "affine": _affine,
    "mimic": _mimic,
}
"""Methods of healing by name."""
