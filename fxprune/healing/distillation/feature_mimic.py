"""Healing by imitation: a short training of the pruned model to give the features that it gave before."""

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
from fxprune.healing.distillation.muon import MuonAdamW
from fxprune.healing.distillation.schedule import Schedule, TrainingState, copy_state
from fxprune.healing.saliency import Maps
from fxprune.healing.teacher_student import with_gradients
from fxprune.runtime.distributed import all_reduce_gradients, rank_and_world

T = TypeVar("T")

HOLD_OUT_EVERY = 8
"""Of so many pieces of calibration batches one is held out."""
IMAGES_PER_STEP = 4
"""Images a step: in the same time many small steps go further than few large ones."""
CHECKS_PER_RUN = 16
"""How often the held-out batches are looked at."""
PATIENCE_CHECKS = 12
"""Looks without a better one, after which it ends."""
INITIAL_LR_SCALE = 1 / 16
"""Share of the learning rate to begin with; every look doubles it, up to all of it or until it proves too much."""
DIVERGENCE_RATIO = 1.2
"""That is where the loss has grown to so many times the best: it goes back to those weights, at half the rate."""
MAX_GRAD_NORM = 1.0
"""Norm that a step's gradient is cut to."""


def train_mimic(
    distance: FeatureDistance,
    learnt: Sequence[Batch],
    held: Sequence[Batch],
    schedule: Schedule,
    tell: Callable[[int, int], None] = lambda step, steps: None,
    saliency: Sequence[Maps] = (),
) -> None:
    """Train a pruned model to give the features of the model as it was, without labels.

    The loss is their distance, salient places counting for more. Norms keep their statistics. Every step mirrors
    about half of its images.

    Parameters
    ----------
    distance : Distance
        The pruned model of its pair is changed: it gets the weights that did best on what is held out, its own if none
        did better.
    learnt, held : sequence of Batch
        See `split_batch` and `hold_out`; the same in all processes, each takes its share of the images of every one.
    schedule : Schedule
    tell : callable
        ``tell(step, steps)``.
    saliency : sequence of Maps
        Of what is learnt from, the same in all processes; without it all places count alike.
    """
    pair = distance.pair
    with with_gradients(pair.student) as weights, torch.enable_grad():
        optimizer = MuonAdamW(weights)
        state = TrainingState(distance.mean(held), 0, INITIAL_LR_SCALE, True, copy_state(pair.student))
        for step in range(1, schedule.steps + 1):
            for weight in weights:
                weight.grad = None
            number, mirrored = _draw_batch(learnt, schedule, step)
            images = _mirror_images(learnt[number], mirrored)
            distance(images, saliency[number] if saliency else None, mirrored).backward()  # type: ignore[no-untyped-call]
            all_reduce_gradients(weights)
            nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step(schedule.learning_rate_at(step) * state.lr_scale)
            tell(step, schedule.steps)
            if step % max(1, schedule.steps // CHECKS_PER_RUN) == 0 or step == schedule.steps:
                found = distance.mean(held)
                astray = not found <= DIVERGENCE_RATIO * state.best  # also if it is no number
                if astray:
                    pair.student.load_state_dict(state.best_weights)
                    optimizer = MuonAdamW(weights)
                state = state.advance(found, pair.student, astray)
                if state.checks_without_gain == PATIENCE_CHECKS:
                    break
        pair.student.load_state_dict(state.best_weights)


def hold_out(parts: Sequence[T]) -> tuple[list[T], list[T]]:
    """Choose some that are held out, and the rest; a single one is both."""
    held = list(parts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]) or list(parts[1:2]) or list(parts)
    return held, [part for part in parts if all(part is not other for other in held)] or held


def split_batch(batch: Batch) -> list[Batch]:
    """Part a batch into some of few images each, enough for all processes; what cannot be parted stays whole."""
    count = max(1, batch.count // max(IMAGES_PER_STEP, rank_and_world()[1])) if _has_images(batch) else 1
    if count == 1:
        return [batch]
    ends = [round(batch.count * number / count) for number in range(count + 1)]
    return [Batch(batch.images[start:end], None, end - start) for start, end in itertools.pairwise(ends)]


def check_shareable_images(batches: Sequence[Batch]) -> None:
    """Raise `BatchError` unless all processes can share out the images of every batch."""
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
                " (a DataLoader leaves out a small last one with drop_last=True)"
            )


def is_shareable(batch: Batch) -> bool:
    """Whether every process can have images of a batch."""
    world = rank_and_world()[1]
    return world == 1 or (_has_images(batch) and batch.count >= world)


def _has_images(batch: Batch) -> bool:
    images = batch.images
    return (isinstance(images, Tensor) and images.ndim == 4) or (
        isinstance(images, list) and all(isinstance(image, Tensor) and image.ndim == 3 for image in images)
    )


def _draw_batch(batches: Sequence[Batch], schedule: Schedule, step: int) -> tuple[int, Tensor]:
    """The batch of a step: every one once, in a random order, then in another; and which of its images to mirror."""
    around, place = divmod(step - 1, len(batches))
    number = int(torch.randperm(len(batches), generator=_generator(schedule.seed, around))[place])
    mirrored = torch.rand(batches[number].count, generator=_generator(schedule.seed, around, place)) < 0.5
    return number, mirrored & _has_images(batches[number])


def _mirror_images(batch: Batch, mirrored: Tensor) -> Batch:
    if not mirrored.any():
        return batch
    images = [image.flip(-1) if turn else image for image, turn in zip(batch.images, mirrored.tolist(), strict=True)]
    return Batch(torch.stack(images) if isinstance(batch.images, Tensor) else images, None, batch.count)


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng(numbers).integers(2**62)))
