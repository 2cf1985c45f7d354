"""Defines the healing methods, their options, and the note that each one leaves in the plan."""

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

from fxprune.adapters.calls import AdaptedModel, batch_loss
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
from fxprune.healing.distillation.labelled_distance import LabelledDistance
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
"""JSON values that a method records in the plan: ``settings["heal"]``."""
NumberedBatch = tuple[int, Batch]
"""A batch, or a part of it, with the number of the batch."""
INTERPOLATIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Shares of the new weights in the interpolations with the old weights. The best one on held-out images is used."""


@dataclass(frozen=True)
class HealingOptions:
    """Options of healing, see `fxprune.heal`.

    Raises
    ------
    SettingError
        If the method is not known, or a number is out of range.
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
    """Settings and shared results of a healing method.

    Attributes
    ----------
    schedule : Schedule
        Settings of the training.
    progress : callable
        ``progress(stage, done, total)``.
    final : bool
        Whether the result is evaluated and noted in the plan. False for the trials of a search.
    saliency : list of Maps
        Saliency of this process's batches, computed once. Other pruned versions of the same model use it too.
    """

    schedule: Schedule = field(default_factory=Schedule)
    progress: Progress = no_progress
    final: bool = False
    saliency: list[Maps] = field(default_factory=list)

    def make_counter(self, stage: str, total: int | None) -> Callable[..., None]:
        """Return a function that reports progress: each call counts one more step of the stage as done."""
        counted = itertools.count(1)
        return lambda *_: self.progress(stage, next(counted), total)


class HealingRun:
    """Heals the student of a pair on some of the images and evaluates it on the others.

    Parameters
    ----------
    pair : TeacherStudent
        The student is changed.
    batches : sequence of Batch
        Normalized by the adapter; the same in all processes. With targets where the method uses labels, else without.
    context : HealingContext

    Attributes
    ----------
    training, held_out : list of (int, Batch)
        Parts of batches for training and for evaluation. If there are fewer training parts than processes, the training
        uses all batches.
    labels : bool
        Whether the batches have targets.
    initial_state : dict
        State of the student before healing.
    """

    def __init__(self, pair: TeacherStudent, batches: Sequence[Batch], context: HealingContext) -> None:
        self.pair, self.batches, self.context = pair, batches, context
        self.labels = batches[0].targets is not None
        whole = [(index, piece) for index, batch in enumerate(batches) for piece in split_batch(batch, pair.select)]
        self.held_out, rest = hold_out(whole)
        self.training = rest if len(rest) >= rank_and_world()[1] else list(enumerate(batches))
        self.initial_state = copy_state(pair.student)

    @cached_property
    def distance(self) -> FeatureDistance:
        """Feature distance of the pair, with the variances of the training batches."""
        return FeatureDistance(self.pair, [piece for _, piece in self.training])

    @cached_property
    def loss_change(self) -> LossChange:
        """Measures the loss change on the held-out batches."""
        pair, own = self.pair, take_shard(self.held_out)
        original = AdaptedModel(pair.teacher, pair.adapter, self.context.schedule.seed)
        return LossChange(original, own if self.labels else [(index, original.label(piece)) for index, piece in own])

    def feature_distance(self) -> float:
        """Return the feature distance on the held-out batches; NaN if processes cannot share the images of a batch."""
        held_out = [piece for _, piece in self.held_out]
        shared = all(is_shareable(piece) for _, piece in [*self.training, *self.held_out])
        return self.distance.mean(held_out) if shared else math.nan

    def check_labels(self) -> None:
        """Raise an error that names the batch if the original cannot compute its loss on the labels of a batch."""
        pair, seed = self.pair, self.context.schedule.seed
        with raise_on_all_ranks(), torch.no_grad():
            for index, piece in take_shard(self.training):
                batch_loss(pair.teacher, pair.adapter, piece, index, seed)

    def fit_layers(self, batches: Sequence[NumberedBatch]) -> None:
        """Fit layer by layer, with larger weights for salient positions."""
        own, context = take_shard(batches), self.context
        if not context.saliency:
            with raise_on_all_ranks():
                seed = context.schedule.seed
                context.saliency.extend(saliency_maps(self.pair, batch, index, seed) for index, batch in own)
        fit = fit_layer if context.final else partial(fit_layer, effort=QUICK_EFFORT)
        reconstruct_layers(
            self.pair, [batch for _, batch in own], fit, context.make_counter("affine", None), context.saliency
        )

    def interpolate(self) -> Note:
        """Set the student to the interpolation of its initial and current weights that has the best loss.

        Without labels, this is the loss nearest to that of the original; with labels, the least loss.

        Returns
        -------
        dict
            ``share``: the share of the current weights, one of `INTERPOLATIONS`. ``loss``: the change of the loss
            ``before`` and ``after`` on the held-out batches: `LossChange.deviation`, with labels `LossChange.increase`.
        """
        measure = self.loss_change.increase if self.labels else self.loss_change.deviation
        end, losses = copy_state(self.pair.student), {}
        for share in INTERPOLATIONS:
            self.pair.student.load_state_dict(_interpolate_state(self.initial_state, end, share))
            losses[share] = measure(self.pair.student)
        best = min(INTERPOLATIONS, key=losses.__getitem__)
        self.pair.student.load_state_dict(_interpolate_state(self.initial_state, end, best))
        return {"share": best, "loss": replace_nonfinite({"before": losses[INTERPOLATIONS[-1]], "after": losses[best]})}


def run_method(method: str, healing: HealingRun) -> Note:
    """Run a method and return its note, with the feature distance on held-out images before and after it."""
    begin, final = perf_counter(), healing.context.final
    before = healing.feature_distance() if final else math.nan
    done = METHODS[method](healing)
    after = healing.feature_distance() if final else math.nan
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
    if healing.labels:
        healing.check_labels()
    healing.fit_layers(healing.training)
    healing.interpolate()
    context = healing.context
    training, held_out = ([piece for _, piece in part] for part in (healing.training, healing.held_out))
    saliency, schedule = gather_shards(context.saliency, len(training)), context.schedule
    distance = healing.distance
    objective = LabelledDistance(distance, held_out, schedule.seed) if healing.labels else distance
    train_mimic(objective, training, held_out, schedule, partial(context.progress, "mimic"), saliency)
    return {**healing.interpolate(), "steps": schedule.steps, "labels": healing.labels}


def _interpolate_state(start: dict[str, Any], end: dict[str, Any], share: float) -> dict[str, Any]:
    floating = {name for name, value in end.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: torch.lerp(start[name], value, share) if name in floating else value for name, value in end.items()}


METHODS: dict[str, Callable[[HealingRun], Note]] = {
    "none": lambda healing: {},
    "affine": _affine,
    "mimic": _mimic,
    "mimic_labelled": _mimic,
}
"""Healing methods by name."""

LABELLED_METHODS = ("mimic_labelled",)
"""Methods that use the labels of the batches."""
