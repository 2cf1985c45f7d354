"""What a model's regions take of its time: milliseconds of one call, on the device and backend that it will run on.

The whole model is timed as it is. In turn with it an interpreter runs its captured graphs and times every node by
itself; that costs time of its own, so only the shares of the nodes count: what the graphs take of a plain call is
handed out to their nodes by these. What lies outside of the graphs is part of the whole and stays.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.detectors.batch import Adapter, Batch, device_of
from fxprune.errors import SettingError
from fxprune.interpreting import NodeTimer
from fxprune.regions import Region
from fxprune.timing import interleave, median_error, ratio_of

BACKENDS: dict[str, Callable[[nn.Module], None]] = {
    "eager": lambda model: None,
    "inductor": lambda model: nn.Module.compile(model),
}
"""By name, what makes a model run on a backend; it stays the same object."""
ROUNDS, WARMUP = 15, 2
WHOLE, AGAIN, NODES = "whole", "whole again", "nodes"

Graphs = Sequence[tuple[str, fx.GraphModule]]


@dataclass(frozen=True)
class Latency:
    """What a call of a model takes, and its regions of that.

    Attributes
    ----------
    whole_ms : float or None
        The whole model, median of the rounds; None if it was not measured.
    regions_ms : mapping of str to float
        What goes with each region, by name; 0 where chance alone gives as much.
    settings : mapping
        What it was measured on: ``device``, ``images`` of the call, ``threads``, ``rounds``, and ``floor``: how far the
        model strays from itself, as a share of `whole_ms`. A smaller difference means nothing.
    """

    whole_ms: float | None
    regions_ms: Mapping[str, float]
    settings: Mapping[str, Any]


UNMEASURED = Latency(None, {}, {})


def check_backend(backend: object) -> None:
    """Raise `SettingError` unless a backend is known, or None."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise SettingError(f"latency_backend {backend!r} is not known; known: {', '.join(BACKENDS)}, or None")


def backend_for(cost: str, backend: str | None) -> str | None:
    """The backend to measure on: the one asked for, or eager if the cost is latency and none was."""
    return "eager" if backend is None and cost == "latency" else backend


def ready_twin(model: nn.Module, backend: str) -> nn.Module:
    """Copy a model that is about to be captured and make it run on a backend; the weights are shared, not copied."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)
    BACKENDS[backend](twin)
    return twin


def measure_latency(
    model: nn.Module,
    captured: nn.Module,
    graphs: Graphs,
    regions: Sequence[Region],
    adapter: Adapter,
    batch: Batch,
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Latency:
    """Time a model, and the nodes of its graphs round by round in turn with it.

    Parameters
    ----------
    model : Module
        As it will be used, see `ready_twin`.
    captured : Module
        The same with its graphs in place.
    graphs
        Island names and graphs.
    regions : sequence of Region
        What is asked for.
    adapter : Adapter
        How to call them.
    batch : Batch
        What on.
    rounds : int
        How often everything is timed, after some rounds to warm up.
    clock : callable
        Gives the time in seconds.
    progress : callable
        ``progress(done, total)`` as rounds go by.

    Returns
    -------
    Latency

    Raises
    ------
    SettingError
        If the model does not run on its backend; says why.

    Examples
    --------
    >>> latency = measure_latency(model, captured, graphs, regions, adapter, batch)  # doctest: +SKIP
    >>> latency.regions_ms["layer3.4"] / latency.whole_ms                   # doctest: +SKIP
    """
    device = device_of(model)
    timer = NodeTimer(graphs, device, clock)
    as_it_is, node_by_node = partial(adapter.predict, model, batch), partial(adapter.predict, captured, batch)

    def run_nodes() -> None:
        timer.run(node_by_node)
        progress(len(timer.runs), WARMUP + rounds)

    with torch.no_grad(), settled(model), settled(captured):
        progress(0, WARMUP + rounds)
        _try(as_it_is)
        functions: dict[str, Callable[[], Any]] = {WHOLE: as_it_is, AGAIN: as_it_is, NODES: run_nodes}
        timings = interleave(functions, rounds=rounds, warmup=WARMUP, device=device, clock=clock)
    again, whole, times = ratio_of(timings[AGAIN], timings[WHOLE]), timings[WHOLE].median_ms, timer.times()[WARMUP:]
    outside = np.median(np.subtract(timings[NODES].latency_ms, [run.graphs_ms for run in times]))
    inside = max(whole - float(outside), 0.0)
    nodes = {region.name: [(region.island, node) for node in region.nodes] for region in regions}
    return Latency(
        whole_ms=whole,
        regions_ms={name: beyond_chance([run.share(own) * inside for run in times]) for name, own in nodes.items()},
        settings={
            "device": str(device),
            "images": batch.count,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "floor": max(abs(again.median - 1), again.error),
        },
    )


def _try(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:  # a backend may fail in any way of its own
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            f"the model does not run on the backend that its latency is to be measured on"
            f" ({type(error).__name__}: {said[:200]}); latency_backend='eager' compiles nothing"
        ) from error


def beyond_chance(values_ms: Sequence[float]) -> float:
    """Median of the rounds; 0 if it is no larger than its own error."""
    low, middle, high = (float(value) for value in np.percentile(values_ms, (25, 50, 75)))
    return middle if middle > median_error(low, high, len(values_ms)) else 0.0


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; calls that do so again spend no time on it until the end of the block."""
    model.eval()
    model.__dict__["eval"] = lambda: model
    try:
        yield
    finally:
        del model.__dict__["eval"]
