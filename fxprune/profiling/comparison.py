"""Times a model and its pruned version side by side, in a few seconds, on one batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch, device_of
from fxprune.profiling.interleaved_timing import compute_ratio, interleave
from fxprune.profiling.latency import frozen_eval_mode

SECONDS = 3.0
"""About the time that the timed rounds may take."""
MIN_ROUNDS, MAX_ROUNDS = 5, 31
"""Least and largest number of rounds. Fewer images per call are timed if the least number would take longer."""
BEFORE, AGAIN, AFTER = "before", "before again", "after"


@dataclass(frozen=True)
class LatencyComparison:
    """Time of a model and of its pruned version, eager and in float32.

    Attributes
    ----------
    before_ms, after_ms : float
        Milliseconds per image: the median over the rounds, and the same times `ratio`.
    ratio, error : float
        Median of the ratios after / before of single rounds, and half its 95 % confidence interval.
    floor : float
        The same of the unpruned model and itself: a difference that is not larger means nothing.
    device : str
        Device of the models.
    images, batch, rounds, threads : int
        Images per timed call and in the batch, number of rounds, and torch's number of threads.
    """

    before_ms: float
    after_ms: float
    ratio: float
    error: float
    floor: float
    device: str
    images: int
    batch: int
    rounds: int
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return asdict(self)


def compare_latency(
    original: AdaptedModel,
    pruned: AdaptedModel,
    batch: Batch,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyComparison:
    """Time two versions of a model in turn, and the original twice per round, for the noise.

    Parameters
    ----------
    original, pruned : AdaptedModel
        The versions. Calls are those at inference.
    batch : Batch
        Input of the calls; part of its images where the rounds would take too long.
    clock : callable
        Returns the time in seconds.

    Returns
    -------
    LatencyComparison

    Raises
    ------
    ValueError
        If a call took no measurable time.

    Examples
    --------
    >>> compare_latency(original, pruned, batch).after_ms              # doctest: +SKIP
    4.31
    """
    device = device_of(original.module)
    with frozen_eval_mode(original.module), frozen_eval_mode(pruned.module):
        part, seconds = _affordable_part(original, batch, device, clock)
        rounds = int(min(max(SECONDS / (3 * max(seconds, 1e-9)), MIN_ROUNDS), MAX_ROUNDS))
        run, rerun = partial(original.predict, part), partial(pruned.predict, part)
        timings = interleave({BEFORE: run, AGAIN: run, AFTER: rerun}, rounds=rounds, device=device, clock=clock)
    ratio, again = (compute_ratio(timings[name], timings[BEFORE]) for name in (AFTER, AGAIN))
    before_ms = timings[BEFORE].median_ms / part.count
    return LatencyComparison(
        before_ms,
        before_ms * ratio.median,
        ratio.median,
        ratio.error,
        max(abs(again.median - 1), again.error),
        str(device),
        part.count,
        batch.count,
        rounds,
        torch.get_num_threads(),
    )


def _affordable_part(
    original: AdaptedModel, batch: Batch, device: torch.device, clock: Callable[[], float]
) -> tuple[Batch, float]:
    """Return the first images of a batch, as many as the least number of rounds can afford, and the time of a call."""
    limit = SECONDS / (3 * MIN_ROUNDS)
    while True:
        seconds = _time_call(partial(original.predict, batch), device, clock)
        if seconds <= limit or batch.count == 1 or not _can_be_cut(batch):
            return batch, seconds
        count = max(1, min(batch.count // 2, int(batch.count * limit / seconds)))
        batch = replace(batch, images=batch.images[:count], targets=None, count=count)


def _time_call(call: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds of a call."""
    timing = interleave({BEFORE: call}, rounds=1, warmup=0, device=device, clock=clock)
    return timing[BEFORE].median_ms / 1e3


def _can_be_cut(batch: Batch) -> bool:
    images = batch.images
    if isinstance(images, list):
        return all(isinstance(image, Tensor) and image.ndim == 3 for image in images)
    return isinstance(images, Tensor) and images.ndim == 4
