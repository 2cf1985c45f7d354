"""Compare the time of functions fairly: run them in turn, many times over, and look at ratios round by round.

The latency of one run is noise: the machine grows warm, other programs come and go. What hits a whole round hits every
function of it, so a ratio taken within a round cancels it. How far such a ratio still strays is measured too: time the
same function under two names, and no smaller difference between others means anything.
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
"""Bytes, a little less than the 32 MiB up to which glibc learns from the blocks that it sees freed."""


@dataclass(frozen=True)
class Timing:
    """How long a function took.

    Attributes
    ----------
    name : str
        What the function was called in the comparison.
    latency_ms : tuple of float
        Milliseconds, one a round, in the order of the rounds.
    """

    name: str
    latency_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over the rounds."""
        return float(np.median(self.latency_ms))


@dataclass(frozen=True)
class Ratio:
    """How many times as long one function took as another.

    Attributes
    ----------
    name, base : str
        The function, and the one it is compared with.
    median, low, high : float
        Median and quartiles of the ratios of the rounds; above 1 where `name` is slower.
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
        """How far the median may be off, see `median_error`."""
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
    """Time functions in turn: in an order drawn at random, then in the same order backwards, and so on.

    A function that comes after a certain other one may find the caches warm, so no order stays. Before the first, the
    process's memory is settled, see `raise_mmap_threshold`.

    Parameters
    ----------
    functions : mapping of str to callable
        What to time. One function under two names shows how far ratios stray by chance.
    rounds : int
        How often each is timed.
    warmup : int
        Rounds that run first and are not timed.
    device : device, optional
        Where the work is done; a CUDA or MPS device is waited for before the clock is read.
    clock : callable
        Gives the time in seconds.

    Returns
    -------
    dict of str to Timing
        In the order of `functions`.

    Raises
    ------
    ValueError
        If there is nothing to time, no round, or a negative number of rounds to warm up.

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
    """Let glibc keep what is freed, where it would give it back to the system and have it filled with zeros anew.

    A process that has freed no larger block than its activations does so time and again, in every call at another
    place; what a part of the model takes is then chance. glibc stops when it sees a block freed of
    `MMAP_THRESHOLD_BYTES` (``mallopt(3)``: ``M_MMAP_THRESHOLD`` is dynamic). Other allocators take no notice.

    Examples
    --------
    >>> raise_mmap_threshold()
    """
    torch.empty(MMAP_THRESHOLD_BYTES, dtype=torch.uint8)


def compute_ratio(timing: Timing, base: Timing) -> Ratio:
    """Compare two functions that were timed together, round by round.

    Parameters
    ----------
    timing, base : Timing
        From one call of `interleave`.

    Returns
    -------
    Ratio
        Of `timing` to `base`.

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
    """Half the 95 % interval of a median, from the quartiles of `count` values.

    1.96 standard errors of a median, 1.2533 sigma / sqrt(count); sigma from the quartiles as of normal values.
    """
    return 1.96 * 1.2533 * (high - low) / 1.349 / math.sqrt(count)


def stopwatch(
    device: torch.device | str | None, clock: Callable[[], float] = time.perf_counter
) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Return what notes a moment, and what gives the milliseconds between two of them.

    A CUDA device notes its own moments, in the order of its work, and nobody waits for it until the milliseconds are
    asked for. Others are waited for before the clock is read.
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
    """Orders to time in, without end; the same ones every time."""
    rng = np.random.default_rng(0)
    while True:
        order = [names[index] for index in rng.permutation(len(names))]
        yield order
        yield order[::-1]


def _wait_for(device: torch.device | str | None) -> Callable[[], None]:
    """Return what waits for the work on a device; on the CPU calls return when it is done."""
    kind = "cpu" if device is None else torch.device(device).type
    if kind == "mps":
        return torch.mps.synchronize
    return (lambda: torch.cuda.synchronize(device)) if kind == "cuda" else lambda: None
