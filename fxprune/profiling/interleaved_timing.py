"""Compares the time of functions: runs them in turn, over many rounds, and takes the ratio of their times per round.

The latency of a single run is noisy: the machine warms up, other programs start and stop. Such a disturbance affects
all functions of a round, so it cancels in a ratio within the round. To measure how much these ratios still vary, time
the same function under two names. A difference between two functions that is not larger means nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MMAP_THRESHOLD_BYTES = (32 << 20) - (64 << 10)
"""Slightly less than 32 MiB, the largest size of a freed block to which glibc adapts its threshold."""


@dataclass(frozen=True)
class Timing:
    """Time of a function in every round.

    Attributes
    ----------
    name : str
        Name of the function in the comparison.
    latency_ms : tuple of float
        Milliseconds, one value per round, in the order of the rounds.
    """

    name: str
    latency_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over the rounds, in milliseconds."""
        return float(np.median(self.latency_ms))


@dataclass(frozen=True)
class Ratio:
    """Ratio of the time of one function to the time of another.

    Attributes
    ----------
    name, base : str
        Names of the function and of the function it is compared with.
    median, low, high : float
        Median and quartiles of the ratios of all rounds; above 1 if `name` is slower.
    rounds : int
        Number of rounds.
    """

    name: str
    base: str
    median: float
    low: float
    high: float
    rounds: int

    @property
    def error(self) -> float:
        """Half the 95 % confidence interval of the median, see `median_error`."""
        return median_error(self.low, self.high, self.rounds)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in turn: in a random order, then in the reverse order, then in a new random order, and so on.

    The order changes because a function may find warm caches after a certain other function. Before the first round,
    `raise_mmap_threshold` is called.

    Parameters
    ----------
    functions : mapping of str to callable
        Functions to time. One function under two names shows how much ratios vary by chance.
    rounds : int
        Number of times that each function is timed.
    warmup : int
        Number of rounds that run first and are not timed.
    device : device, optional
        Device of the work. A CUDA or MPS device is synchronized before the clock is read.
    clock : callable
        Returns the time in seconds.

    Returns
    -------
    dict of str to Timing
        In the order of `functions`.

    Raises
    ------
    ValueError
        If there is no function, no round, or a negative number of warmup rounds.

    Examples
    --------
    >>> timings = interleave({"a": lambda: sum(range(100)), "b": lambda: sum(range(900))}, rounds=9)
    >>> compute_ratio(timings["b"], timings["a"]).rounds
    9
    """
    if not functions:
        raise ValueError("there is no function to time")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be 1 or more and warmup 0 or more, got {rounds} and {warmup}")
    raise_mmap_threshold()
    wait = _wait_for(device)
    latency_ms: dict[str, list[float]] = {name: [] for name in functions}
    for index, order in zip(range(-warmup, rounds), _orders(list(functions)), strict=False):
        for name in order:
            wait()
            start = clock()
            functions[name]()
            wait()
            if index >= 0:
                latency_ms[name].append((clock() - start) * 1e3)
    return {name: Timing(name, tuple(values)) for name, values in latency_ms.items()}


def raise_mmap_threshold() -> None:
    """Make glibc keep freed memory, so that the system does not have to fill it with zeros again.

    A process returns the memory of its activations to the system until it has freed a larger block. This happens in
    every call, at changing places, so the time of a part of the model becomes random. glibc stops this after it has
    freed a block of `MMAP_THRESHOLD_BYTES` (``mallopt(3)``: ``M_MMAP_THRESHOLD`` is dynamic). Other allocators ignore
    this call.

    Examples
    --------
    >>> raise_mmap_threshold()
    """
    torch.empty(MMAP_THRESHOLD_BYTES, dtype=torch.uint8)


def compute_ratio(timing: Timing, base: Timing) -> Ratio:
    """Compute the ratio of the times of two functions from the same call of `interleave`.

    Parameters
    ----------
    timing, base : Timing
        The function, and the function it is compared with.

    Returns
    -------
    Ratio
        Ratio of `timing` to `base`.

    Raises
    ------
    ValueError
        If the numbers of rounds differ, or `base` took no measurable time in some round.
    """
    if len(timing.latency_ms) != len(base.latency_ms):
        raise ValueError(
            f"{timing.name!r} was timed {len(timing.latency_ms)} times and {base.name!r} {len(base.latency_ms)} times;"
            " ratios are taken within a round, so time them in one call"
        )
    if not base.latency_ms or min(base.latency_ms) <= 0:
        raise ValueError(f"{base.name!r} took no measurable time in some round; give it more work")
    ratios = np.asarray(timing.latency_ms) / np.asarray(base.latency_ms)
    low, median, high = (float(value) for value in np.percentile(ratios, (25, 50, 75)))
    return Ratio(timing.name, base.name, median, low, high, len(ratios))


def median_error(low: float, high: float, count: int) -> float:
    """Compute half the 95 % confidence interval of a median from the quartiles of `count` values.

    This is 1.96 standard errors of the median, 1.2533 sigma / sqrt(count). Sigma is (high - low) / 1.349, as for normal
    values.

    Examples
    --------
    >>> round(median_error(0.9, 1.1, 100), 3)
    0.036
    """
    return 1.96 * 1.2533 * (high - low) / 1.349 / math.sqrt(count)


def stopwatch(
    device: torch.device | str | None, clock: Callable[[], float] = time.perf_counter
) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Return a function that records a moment, and a function that returns the milliseconds between two moments.

    On a CUDA device a moment is an event in its stream. The host waits for it only when the milliseconds are computed.
    Other devices are synchronized before the clock is read.

    Examples
    --------
    >>> now, elapsed_ms = stopwatch(None)
    >>> elapsed_ms(now(), now()) >= 0
    True
    """
    if device is None or torch.device(device).type != "cuda":
        wait = _wait_for(device)

        def read() -> float:
            wait()
            return clock()

        return read, lambda begin, end: (end - begin) * 1e3

    def moment() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    return moment, between


def _orders(names: list[str]) -> Iterator[list[str]]:
    """Yield orders of the names without end; the same sequence in every call."""
    rng = np.random.default_rng(0)
    while True:
        order = [names[index] for index in rng.permutation(len(names))]
        yield order
        yield order[::-1]


def _wait_for(device: torch.device | str | None) -> Callable[[], None]:
    """Return a function that waits for the work on a device. It does nothing on the CPU: calls block there."""
    kind = "cpu" if device is None else torch.device(device).type
    if kind == "mps":
        return torch.mps.synchronize
    return (lambda: torch.cuda.synchronize(device)) if kind == "cuda" else lambda: None
