"""What a model's regions take of its time: milliseconds of one call, on the device and backend that it will run on.

The whole model is timed as it is, and in turn with it what tells how much of that its regions take. In eager mode an
interpreter times every node by itself. That costs time of its own, so only the shares of the nodes count: what the
captured graphs take of a plain call is handed out to their nodes; what lies outside of them stays. Compiled code has
no nodes, so there every region is cut out, compiled and timed by itself, see `fxprune.profiling.region_modules`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.errors import SettingError
from fxprune.graph.fx_utils import join_path
from fxprune.graph.interpreters import Graphs
from fxprune.graph.operators import in_place_layers
from fxprune.graph.records import Region
from fxprune.profiling.interleaved_timing import Timing, compute_ratio, interleave, median_error
from fxprune.profiling.node_timer import NodeTimer
from fxprune.profiling.region_modules import extract_regions

ROUNDS, WARMUP = 15, 2
CHAIN_EXTRA = 2
"""Of a compiled region so many more are timed in a row with it, and what one of them adds on average counts."""
WHOLE, AGAIN, NODES = "whole", "whole again", "nodes"

Timings = Mapping[str, Timing]
Tell = Callable[[str, int, int | None], None]


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


@dataclass(frozen=True)
class ProbeInputs:
    """A captured model, as a probe is given it.

    Attributes
    ----------
    run : callable
        Runs it, its graphs in place, in eager mode.
    graphs
        Island names and graphs.
    regions : sequence of Region
        What is asked for.
    prepare : callable
        Makes a module run on the backend.
    device, clock, tell
        Where it runs, what gives the time in seconds, and what is told of progress.
    """

    run: Callable[[], Any]
    graphs: Graphs
    regions: Sequence[Region]
    prepare: Callable[[nn.Module], None]
    device: torch.device
    clock: Callable[[], float]
    tell: Tell


@dataclass(frozen=True)
class Probe:
    """What is timed in turn with the whole model, and what gives the regions' milliseconds of every round then."""

    functions: Mapping[str, Callable[[], Any]]
    regions_ms: Callable[[Timings], Mapping[str, Any]]


def node_probe(watched: ProbeInputs) -> Probe:
    """Share out what the graphs take of a plain call as an interpreter finds it spent on their nodes."""
    timer = NodeTimer(watched.graphs, watched.device, watched.clock)
    nodes = {region.name: [(region.island, node) for node in region.nodes] for region in watched.regions}

    def regions_ms(timings: Timings) -> Mapping[str, Any]:
        rounds = timings[NODES].latency_ms
        times = timer.times()[-len(rounds) :]
        outside = np.median(np.subtract(rounds, [run.graphs_ms for run in times]))
        inside = max(timings[WHOLE].median_ms - float(outside), 0.0)
        return {name: [run.share(own) * inside for run in times] for name, own in nodes.items()}

    return Probe({NODES: partial(timer.run, watched.run)}, regions_ms)


def compiled_probe(watched: ProbeInputs) -> Probe:
    """Compile every region by itself, equal ones once, and take what it adds to itself as a share of the whole.

    What a compiler makes of a row need not grow evenly: of RetinaNet's head a second block added 12 ms, a third 8.
    """
    pieces = extract_regions(watched.run, watched.graphs, watched.regions)
    kinds = {piece.work_key: piece for piece in pieces}
    functions: dict[str, Callable[[], Any]] = {}
    for done, (kind, piece) in enumerate(kinds.items()):
        watched.tell("compile", done, len(kinds))
        for times in (1, 1 + CHAIN_EXTRA):
            module, values = piece.chained(times)
            watched.prepare(module)
            functions[f"{times} x {kind}"] = partial(module, *values)
            _try_call(functions[f"{times} x {kind}"])
    watched.tell("compile", len(kinds), len(kinds))

    def regions_ms(timings: Timings) -> Mapping[str, Any]:
        whole = timings[WHOLE]
        added = {
            kind: np.subtract(timings[f"{1 + CHAIN_EXTRA} x {kind}"].latency_ms, timings[f"1 x {kind}"].latency_ms)
            / CHAIN_EXTRA / whole.latency_ms * whole.median_ms
            for kind in kinds
        }  # fmt: skip
        return {piece.region: added[piece.work_key] for piece in pieces}

    return Probe(functions, regions_ms)


@dataclass(frozen=True)
class Backend:
    """What makes a module run on it, in place; what finds the regions' part; and a context to run in meanwhile."""

    prepare: Callable[[nn.Module], None]
    probe: Callable[[ProbeInputs], Probe]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def _raise_recompile_limit() -> AbstractContextManager[Any]:
    """Models of one class share code, each compiles it anew, and after some times Dynamo goes on in eager mode."""
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=256)
    return patched


BACKENDS = {
    "eager": Backend(lambda module: None, node_probe),
    "inductor": Backend(partial(nn.Module.compile, dynamic=False), compiled_probe, _raise_recompile_limit),
}
"""Backends by name; each with the probe that predicts measured cuts best (`benchmarks.bench_latency`)."""


def check_backend(backend: object) -> None:
    """Raise `SettingError` unless a backend is known, or None."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise SettingError(f"latency_backend {backend!r} is not known; known: {', '.join(BACKENDS)}, or None")


def choose_backend(cost: str, backend: str | None) -> str | None:
    """The backend to measure on: the one asked for, or eager if the cost is latency and none was."""
    return "eager" if backend is None and cost == "latency" else backend


def backend_copy(model: nn.Module, backend: Backend) -> nn.Module:
    """Copy a model that is about to be captured and make it run on a backend; the weights are shared, not copied."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)
    backend.prepare(twin)
    return twin


def measure_latency(
    backend: Backend,
    model: nn.Module,
    captured: nn.Module,
    graphs: Graphs,
    regions: Sequence[Region],
    adapter: Adapter,
    batch: Batch,
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    tell: Tell = lambda stage, done, total: None,
) -> Latency:
    """Time a model, and in turn with it what tells how much of that its regions take.

    Parameters
    ----------
    backend : Backend
        What it runs on.
    model, captured : Module
        As it will be used, see `backend_copy`, and with its graphs in place.
    graphs, regions
        Island names and graphs, and what is asked for.
    adapter, batch : Adapter, Batch
        How to call them, and on what.
    rounds, clock
        How often everything is timed, after some rounds to warm up, and what gives the time in seconds.
    tell : callable
        ``tell(stage, done, total)`` as work goes on.

    Returns
    -------
    Latency

    Raises
    ------
    SettingError
        If the model does not run on the backend; says why.

    Examples
    --------
    >>> twin = backend_copy(model, BACKENDS["eager"])                # doctest: +SKIP
    >>> latency = measure_latency(BACKENDS["eager"], twin, captured, graphs, regions, adapter, batch)  # doctest: +SKIP
    >>> latency.regions_ms["layer3.4"] / latency.whole_ms          # doctest: +SKIP
    """
    device, done = device_of(model), iter(range(1 - WARMUP, rounds + 1))
    whole, run = partial(adapter.predict, model, batch), partial(adapter.predict, captured, batch)
    with backend.context(), _comparable(model, captured, graphs):
        tell("latency", 0, rounds)
        _try_call(whole)
        probe = backend.probe(ProbeInputs(run, graphs, regions, backend.prepare, device, clock, tell))
        progress = {"progress": lambda: tell("latency", max(next(done), 0), rounds)}
        functions: dict[str, Callable[[], Any]] = {WHOLE: whole, AGAIN: whole, **probe.functions, **progress}
        timings = interleave(functions, rounds=rounds, warmup=WARMUP, device=device, clock=clock)
    again, threads = compute_ratio(timings[AGAIN], timings[WHOLE]), torch.get_num_threads()
    settings = {"device": str(device), "images": batch.count, "threads": threads, "rounds": rounds}
    settings["floor"] = max(abs(again.median - 1), again.error)
    regions_ms = {name: significant_median(values) for name, values in probe.regions_ms(timings).items()}
    return Latency(timings[WHOLE].median_ms, regions_ms, settings)


@contextmanager
def _comparable(model: nn.Module, captured: nn.Module, graphs: Graphs) -> Iterator[None]:
    """Let a model and its captured version do the same work, without gradients, until the end of the block."""
    with torch.no_grad(), frozen_eval_mode(model), frozen_eval_mode(captured), matching_inplace_flags(graphs, model):
        yield


def _try_call(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:  # a backend may fail in any way of its own
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            f"the model does not run on the backend that its latency is to be measured on"
            f" ({type(error).__name__}: {said[:200]}); latency_backend='eager' compiles nothing"
        ) from error


def significant_median(values_ms: Sequence[float]) -> float:
    """Median of the rounds; 0 if it is no larger than its own error."""
    low, middle, high = (float(value) for value in np.percentile(values_ms, (25, 50, 75)))
    return middle if middle > median_error(low, high, len(values_ms)) else 0.0


@contextmanager
def frozen_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; calls that do so again spend no time on it until the end of the block."""
    model.eval()
    model.__dict__["eval"] = lambda: model
    try:
        yield
    finally:
        del model.__dict__["eval"]


@contextmanager
def matching_inplace_flags(graphs: Graphs, model: nn.Module) -> Iterator[None]:
    """Let the layers of captured graphs overwrite what those of the model do, unless something else reads it.

    Captured graphs are functional; a model that is not would spend another share of its time in its largest values.
    """
    layers = [
        layer
        for island, gm in graphs
        for path, layer, harmless in in_place_layers(gm)
        if harmless and getattr(model.get_submodule(join_path(island, path)), "inplace", False)
    ]
    try:
        for layer in layers:
            layer.inplace = True  # type: ignore[assignment]
        yield
    finally:
        for layer in layers:
            layer.inplace = False  # type: ignore[assignment]
