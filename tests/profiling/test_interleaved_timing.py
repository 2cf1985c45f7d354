"""Interleaved timing, on a fake clock."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from fxprune.profiling.interleaved_timing import Ratio, Timing, compute_ratio, interleave, median_error, stopwatch
from tests.helpers.clocks import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_interleave_orders_come_in_reversed_pairs(clock: FakeClock) -> None:
    functions = {name: clock.taking(name, 1.0) for name in "ABCDE"}
    interleave(functions, rounds=40, warmup=0, clock=clock)
    rounds = ["".join(clock.calls[start : start + 5]) for start in range(0, 200, 5)]
    assert all(sorted(order) == list("ABCDE") for order in rounds)
    assert all(first == second[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert len(set(rounds)) > 20


def test_interleave_varies_the_predecessor_of_each_function(clock: FakeClock) -> None:
    interleave({name: clock.taking(name, 1.0) for name in "ABCDE"}, rounds=60, warmup=0, clock=clock)
    pairs = set(zip(clock.calls, clock.calls[1:], strict=False))
    assert len({pair for pair in pairs if pair[0] != pair[1]}) == 20


def test_interleave_of_two_functions_alternates_the_first(clock: FakeClock) -> None:
    interleave({name: clock.taking(name, 1.0) for name in "AB"}, rounds=6, warmup=0, clock=clock)
    assert clock.calls[::2].count("A") == 3


def test_interleave_gives_milliseconds_per_function(clock: FakeClock) -> None:
    functions = {"slow": clock.taking("slow", 0.004, 0.006), "fast": clock.taking("fast", 0.001)}
    timings = interleave(functions, rounds=3, warmup=0, clock=clock)
    assert list(timings) == ["slow", "fast"]
    assert timings["slow"].latency_ms == pytest.approx((4.0, 6.0, 6.0))
    assert timings["fast"].latency_ms == pytest.approx((1.0, 1.0, 1.0))
    assert timings["slow"].median_ms == pytest.approx(6.0)


def test_interleave_does_not_count_warmup(clock: FakeClock) -> None:
    timing = interleave({"f": clock.taking("f", 9.0, 9.0, 1.0)}, rounds=2, warmup=2, clock=clock)["f"]
    assert timing.latency_ms == pytest.approx((1000.0, 1000.0))
    assert len(clock.calls) == 4


def test_interleave_runs_warmup_in_addition_to_rounds(clock: FakeClock) -> None:
    timings = interleave({name: clock.taking(name, 1.0) for name in "AB"}, rounds=2, warmup=3, clock=clock)
    assert len(clock.calls) == 2 * (3 + 2)
    assert len(timings["A"].latency_ms) == 2


def test_compute_ratio_pairs_rounds() -> None:
    # A machine that slows down fourfold: the ratio of medians would be 1, the rounds all say 2 and 0.5.
    base = Timing("base", (1.0, 2.0, 4.0))
    assert compute_ratio(Timing("twice", (2.0, 4.0, 8.0)), base) == Ratio("twice", "base", 2.0, 2.0, 2.0, 3)
    crossed = compute_ratio(Timing("crossed", (4.0, 2.0, 1.0)), base)
    assert (crossed.median, crossed.low, crossed.high) == (1.0, 0.625, 2.5)


def test_compute_ratio_cancels_drift_between_rounds(clock: FakeClock) -> None:
    drift = [1.0, 3.0, 2.0, 10.0]
    functions = {"b": clock.taking("b", *(1.5 * d for d in drift)), "a": clock.taking("a", *drift)}
    timings = interleave(functions, rounds=4, warmup=0, clock=clock)
    ratio = compute_ratio(timings["b"], timings["a"])
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert str(ratio) == "1.500 [1.500, 1.500]"


def test_compute_ratio_of_one_function_with_itself_is_one(clock: FakeClock) -> None:
    function = clock.taking("f", 0.5)
    timings = interleave({"a": function, "a again": function}, rounds=5, clock=clock)
    assert compute_ratio(timings["a again"], timings["a"]).median == 1.0


def test_interleave_waits_for_cuda_inside_the_timed_span(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    pending = 0.0

    def launch() -> None:
        nonlocal pending
        pending += 0.002

    def synchronize(device: object) -> None:
        nonlocal pending
        assert torch.device(str(device)).type == "cuda"
        clock.now, pending = clock.now + pending, 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timing = interleave({"f": launch}, rounds=2, device="cuda:1", clock=clock)["f"]
    assert timing.latency_ms == pytest.approx((2.0, 2.0))


def test_interleave_waits_for_earlier_work_before_the_clock_starts(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = [5.0]

    def synchronize(device: object) -> None:
        clock.now += sum(pending)
        pending.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timing = interleave({"f": clock.taking("f", 0.001)}, rounds=1, warmup=0, device="cuda", clock=clock)["f"]
    assert timing.latency_ms == pytest.approx((1.0,))


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_interleave_on_cpu_does_not_synchronize(
    device: torch.device | str | None, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: object) -> None:
        raise AssertionError("synchronized without need")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    assert interleave({"f": clock.taking("f", 1.0)}, rounds=1, device=device, clock=clock)


def test_interleave_refuses_bad_arguments(clock: FakeClock) -> None:
    with pytest.raises(ValueError, match="no function"):
        interleave({}, rounds=1)
    with pytest.raises(ValueError, match="rounds must be 1"):
        interleave({"f": clock.taking("f", 1.0)}, rounds=0)
    with pytest.raises(ValueError, match="got 1 and -1"):
        interleave({"f": clock.taking("f", 1.0)}, rounds=1, warmup=-1)
    assert not clock.calls


def test_compute_ratio_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"'a' .*2 times and 'b' 1"):
        compute_ratio(Timing("a", (1.0, 1.0)), Timing("b", (1.0,)))
    with pytest.raises(ValueError, match="'b' took no measurable time"):
        compute_ratio(Timing("a", (1.0,)), Timing("b", (0.0,)))


def test_interleave_passes_on_errors_of_the_functions(clock: FakeClock) -> None:
    def fail() -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        interleave({"f": fail}, rounds=1, clock=clock)


def test_timings_are_immutable_values() -> None:
    timing = Timing("a", (1.0,))
    assert timing == Timing("a", (1.0,))
    with pytest.raises(FrozenInstanceError):
        timing.name = "b"  # type: ignore[misc]


def test_median_error_shrinks_with_rounds_and_grows_with_spread() -> None:
    generator = np.random.default_rng(0)
    for count in (9, 25, 101):
        draws = generator.normal(5.0, 2.0, size=(4000, count))
        spread = 1.96 * np.median(draws, axis=1).std()
        low, high = 5.0 - 2.0 * 0.6745, 5.0 + 2.0 * 0.6745
        assert median_error(low, high, count) == pytest.approx(spread, rel=0.08)
    assert Ratio("a", "b", 1.0, 0.9, 1.1, 16).error == median_error(0.9, 1.1, 16)


def test_stopwatch_on_cpu_reads_the_clock(clock: FakeClock) -> None:
    moment, between = stopwatch("cpu", clock)
    begin = moment()
    clock.taking("f", 0.25)()
    assert between(begin, moment()) == pytest.approx(250.0)


def test_stopwatch_on_mps_synchronizes(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "synchronize", clock.taking("wait", 0.5))
    timing = interleave({"f": lambda: None}, rounds=1, warmup=0, device="mps", clock=clock)["f"]
    assert timing.latency_ms == pytest.approx((500.0,))
    moment, between = stopwatch(torch.device("mps"), clock)
    assert between(moment(), moment()) == pytest.approx(500.0)


def test_stopwatch_on_cuda_records_events_and_waits_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at = len(log)
            log.append(f"record on {stream}")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 3.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    moment, between = stopwatch(torch.device("cuda:1"))
    begin, end = moment(), moment()
    assert log == ["record on stream of cuda:1"] * 2
    assert between(begin, end) == 3.0
    assert log[-1] == "wait"


FAULTS = """
import resource, torch
from fxprune.profiling.interleaved_timing import raise_mmap_threshold

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        [torch.ones(1_000_000) for _ in range(12)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

raise_mmap_threshold()
page_faults()
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators take no notice")
def test_raise_mmap_threshold_keeps_freed_memory() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000  # 60 tensors of 977 pages, unless what came before has settled it
