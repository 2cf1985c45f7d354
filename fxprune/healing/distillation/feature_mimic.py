"""Trains a pruned model for a short time to reproduce the features of the original, without or with labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Batch
from fxprune.errors import BatchError
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.distillation.labelled_distance import LabelledDistance
from fxprune.healing.distillation.muon import MuonAdamW
from fxprune.healing.distillation.schedule import Schedule, TrainingState, copy_state
from fxprune.healing.saliency import Maps
from fxprune.healing.teacher_student import with_gradients
from fxprune.runtime.distributed import all_reduce_gradients, rank_and_world

T = TypeVar("T")

HOLD_OUT_EVERY = 8
"""One of this many parts of calibration batches is held out."""
IMAGES_PER_STEP = 4
"""About the number of images per step. In the same time, many small steps reduce the loss more than few large ones."""
CHECKS_PER_RUN = 16
"""Number of checks of the loss on held-out batches per training."""
PATIENCE_CHECKS = 12
"""Number of checks without a new best loss after which the training stops."""
INITIAL_LR_SCALE = 1 / 16
"""Initial share of the learning rate. Every check doubles it, until it is 1 or the training diverges."""
DIVERGENCE_RATIO = 1.2
"""Ratio of the loss to the best loss above which the best weights are restored and the learning rate is halved."""
MAX_GRAD_NORM = 1.0
"""Largest norm of the gradient of a step; larger gradients are clipped."""


def train_mimic(
    objective: FeatureDistance | LabelledDistance,
    training: Sequence[Batch],
    held_out: Sequence[Batch],
    schedule: Schedule,
    progress: Callable[[int, int], None] = lambda step, steps: None,
    saliency: Sequence[Maps] = (),
) -> None:
    """Train a pruned model to reproduce the features of the original.

    The feature distance is weighted by saliency. Norms keep their statistics. Every step mirrors about half of the
    images whose features it compares.

    Parameters
    ----------
    objective : FeatureDistance or LabelledDistance
        What is minimized: without or with labels. The student of its pair is changed. It gets the weights with the
        least objective on held-out batches; these may be its initial weights.
    training, held_out : sequence of Batch
        See `split_batch` and `hold_out`. The same in all processes; each uses its share of the images of every batch.
    schedule : Schedule
    progress : callable
        ``progress(step, steps)``.
    saliency : sequence of Maps
        Saliency of the training batches, the same in all processes. Without it, all positions have equal weights.

    Examples
    --------
    >>> train_mimic(FeatureDistance(pair, training), training, held_out, Schedule(steps=400))   # doctest: +SKIP
    """
    pair = objective.pair
    with with_gradients(pair.student) as weights, torch.enable_grad():
        optimizer = MuonAdamW(weights)
        state = TrainingState(objective.mean(held_out), 0, INITIAL_LR_SCALE, True, copy_state(pair.student))
        for step in range(1, schedule.steps + 1):
            for weight in weights:
                weight.grad = None
            number, mirrored = _draw_batch(training, schedule, step)
            maps = saliency[number] if saliency else None
            objective(training[number], maps, mirrored).backward()  # type: ignore[no-untyped-call]
            all_reduce_gradients(weights)
            nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step(schedule.learning_rate_at(step) * state.lr_scale)
            progress(step, schedule.steps)
            if step % max(1, schedule.steps // CHECKS_PER_RUN) == 0 or step == schedule.steps:
                loss = objective.mean(held_out)
                diverged = not loss <= DIVERGENCE_RATIO * state.best  # also if the loss is NaN
                if diverged:
                    pair.student.load_state_dict(state.best_weights)
                    optimizer = MuonAdamW(weights)
                state = state.advance(loss, pair.student, diverged)
                if state.checks_without_gain == PATIENCE_CHECKS:
                    break
        pair.student.load_state_dict(state.best_weights)


def hold_out(parts: Sequence[T]) -> tuple[list[T], list[T]]:
    """Return the parts to hold out and the parts for training. A single part is in both lists."""
    held_out = list(parts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]) or list(parts[1:2]) or list(parts)
    return held_out, [part for part in parts if all(part is not other for other in held_out)] or held_out


def split_batch(batch: Batch, select: Callable[[Batch, range], Batch]) -> list[Batch]:
    """Split a batch into parts of a few images, enough for all processes. Batches of unknown forms stay whole.

    `select` returns the images of a batch with the given numbers, see `TeacherStudent.select`.
    """
    count = max(1, batch.count // max(IMAGES_PER_STEP, rank_and_world()[1])) if _has_images(batch) else 1
    if count == 1:
        return [batch]
    ends = [round(batch.count * number / count) for number in range(count + 1)]
    return [select(batch, range(start, end)) for start, end in itertools.pairwise(ends)]


def check_shareable_images(batches: Sequence[Batch]) -> None:
    """Raise `BatchError` unless the processes can share the images of every batch."""
    world = rank_and_world()[1]
    for index, batch in enumerate(batches if world > 1 else ()):
        if not _has_images(batch):
            raise BatchError(
                f"batch {index}: training in several processes needs batches that are a tensor (N, C, H, W) or a list"
                " of images"
            )
        if batch.count < world:
            raise BatchError(
                f"batch {index}: its {batch.count} images cannot be shared by {world} processes; give larger batches"
                " (with drop_last=True, a DataLoader leaves out a small last batch)"
            )


def is_shareable(batch: Batch) -> bool:
    """Whether a batch has images for every process."""
    world = rank_and_world()[1]
    return world == 1 or (_has_images(batch) and batch.count >= world)


def _has_images(batch: Batch) -> bool:
    images = batch.images
    return (isinstance(images, Tensor) and images.ndim == 4) or (
        isinstance(images, list) and all(isinstance(image, Tensor) and image.ndim == 3 for image in images)
    )


def _draw_batch(batches: Sequence[Batch], schedule: Schedule, step: int) -> tuple[int, Tensor]:
    """Return the batch number of a step and which images to mirror. The order of batches is random in every epoch."""
    epoch, position = divmod(step - 1, len(batches))
    number = int(torch.randperm(len(batches), generator=_generator(schedule.seed, epoch))[position])
    mirrored = torch.rand(batches[number].count, generator=_generator(schedule.seed, epoch, position)) < 0.5
    return number, mirrored & _has_images(batches[number])


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng(numbers).integers(2**62)))
