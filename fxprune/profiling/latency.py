"""Measures the milliseconds of one model call and the part of each region, on the device and backend of the model.

The whole model is timed in turn with a probe, which measures the part of each region. In eager mode an interpreter
times every node. The interpreter itself takes time, so only the shares of the nodes are used: the time of the captured
graphs in a plain call is divided among their nodes by these shares. Compiled code has no nodes, so every region is
extracted, compiled and timed alone, see `fxprune.profiling.region_modules`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.errors import SettingError
from fxprune.graph.interpreters import Graphs, restricted_layers
from fxprune.graph.operators import in_place_layers
from fxprune.graph.records import Region
from fxprune.profiling.interleaved_timing import Timing, compute_ratio, interleave, median_error
from fxprune.profiling.node_timer import NodeTimer
from fxprune.profiling.region_modules import extract_regions
from fxprune.runtime.function_copies import rebind_functions

ROUNDS, WARMUP = 15, 2
CHAIN_EXTRA = 2
"""Number of additional copies in the chain of a compiled region. The average time per additional copy counts."""
WHOLE, AGAIN, NODES = "whole", "whole again", "nodes"

Timings = Mapping[str, Timing]
Tell = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Latency:
    """Time of one model call, and the part of each region.

    Attributes
    ----------
    whole_ms : float or None
        Time of the whole model, median over the rounds; None if it was not measured.
    regions_ms : mapping of str to float
        Time of each region, by name; 0 if it is not larger than its error.
    settings : mapping
        Conditions of the measurement: ``device``, ``images`` per call, ``threads``, ``rounds``, and ``floor``: the
        difference between two timings of the same model, as a share of `whole_ms`. A smaller difference means nothing.
    """

    whole_ms: float | None
    regions_ms: Mapping[str, float]
    settings: Mapping[str, Any]


UNMEASURED = Latency(None, {}, {})


@dataclass(frozen=True)
class ProbeInputs:
    """Inputs of a probe: a captured model and how to run it.

    Attributes
    ----------
    run : callable
        Runs the captured model in eager mode.
    graphs : Graphs
        The graphs of its islands.
    regions : sequence of Region
        Regions to measure.
    prepare : callable
        Makes a module run on the backend.
    device, clock, tell
        Device of the model, function that returns the time in seconds, and function that receives the progress.
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
    """Functions to time in turn with the whole model, and a function that returns milliseconds per region and round."""

    functions: Mapping[str, Callable[[], Any]]
    regions_ms: Callable[[Timings], Mapping[str, Any]]


def node_probe(watched: ProbeInputs) -> Probe:
    """Make a probe that divides the time of the graphs among their nodes by the shares that an interpreter measures."""
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
    """Make a probe that compiles each region alone (equal regions once) and measures the time per additional copy.

    The time of compiled copies need not grow evenly: in RetinaNet's head a second block added 12 ms, a third one 8 ms.
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
    """Function that makes a module run on the backend, in place; probe of the regions; context for the measurement."""

    prepare: Callable[[nn.Module], None]
    probe: Callable[[ProbeInputs], Probe]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def _raise_recompile_limit() -> AbstractContextManager[Any]:
    """Raise the limit: models of one class share code, each recompiles it, and above the limit Dynamo runs eagerly."""
    config: Any = torch.compiler.config
    patched: AbstractContextManager[Any] = config.patch(recompile_limit=256)
    return patched


BACKENDS = {
    "eager": Backend(lambda module: None, node_probe),
    "inductor": Backend(partial(nn.Module.compile, dynamic=False), compiled_probe, _raise_recompile_limit),
}
"""Backends by name, each with the probe that predicts measured cuts best (`benchmarks.bench_latency`)."""


def check_backend(backend: object) -> None:
    """Raise `SettingError` unless `backend` is None or the name of a known backend."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise SettingError(f"latency_backend {backend!r} is not known; known: {', '.join(BACKENDS)}, or None")


def choose_backend(cost: str, backend: str | None) -> str | None:
    """Return the requested backend; without a request, eager if the cost is latency, else None."""
    return "eager" if backend is None and cost == "latency" else backend


def backend_copy(model: nn.Module, backend: Backend) -> nn.Module:
    """Copy a model before it is captured and make the copy run on a backend; both share their weights."""
    copies: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, copies)
    rebind_functions(twin, copies)
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
    """Time a model, in turn with the probe that measures the part of each region.

    Parameters
    ----------
    backend : Backend
        Backend of the measurement.
    model, captured : Module
        The model as it will be used, see `backend_copy`, and the captured model.
    graphs, regions
        The graphs of the islands, and the regions to measure.
    adapter, batch : Adapter, Batch
        Adapter that calls both models, and the input of the calls.
    rounds, clock
        Number of timed rounds, after some warmup rounds, and function that returns the time in seconds.
    tell : callable
        ``tell(stage, done, total)`` receives the progress.

    Returns
    -------
    Latency
        Milliseconds of the whole model and of each region.

    Raises
    ------
    SettingError
        If the model does not run on the backend; the message says why.

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
    """Make a model and its captured version do the same work, without gradients, until the end of the block."""
    with torch.no_grad(), frozen_eval_mode(model), frozen_eval_mode(captured), harmless_inplace_flags(graphs):
        yield


def _try_call(call: Callable[[], Any]) -> None:
    try:
        call()
    except Exception as error:  # a backend may raise any error
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            f"the model does not run on the backend of the latency measurement"
            f" ({type(error).__name__}: {said[:200]}); latency_backend='eager' compiles nothing"
        ) from error


def significant_median(values_ms: Sequence[float]) -> float:
    """Return the median of the rounds in milliseconds; 0 if it is not larger than its own error.

    Examples
    --------
    >>> significant_median([1.0, 1.1, 1.2]), significant_median([-1.0, 0.1, 1.0])
    (1.1, 0.0)
    """
    low, middle, high = (float(value) for value in np.percentile(values_ms, (25, 50, 75)))
    return middle if middle > median_error(low, high, len(values_ms)) else 0.0


@contextmanager
def frozen_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode. Until the end of the block, further calls of `eval` take no time."""
    model.eval()
    model.__dict__["eval"] = lambda: model
    try:
        yield
    finally:
        del model.__dict__["eval"]


@contextmanager
def harmless_inplace_flags(graphs: Graphs) -> Iterator[None]:
    """Clear the `inplace` flag of captured layers that would overwrite a value with another reader in their graph.

    The other layers keep their flag. Without it, the largest values would take another share of the time.
    """
    with ExitStack() as stack:
        for _, gm in graphs:
            stack.enter_context(restricted_layers(list(in_place_layers(gm)), in_place=True))
        yield
