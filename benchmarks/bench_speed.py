"""Latency of pruned systems, eager and compiled, compared with the time that the removed regions take by themselves.

    python -m benchmarks.bench_speed [--systems NAME ...] [--backends eager inductor] [--batches 1 8]
                                     [--budgets 0.1 0.2] [--device cuda] [--rounds 15]

For every system, backend and batch size these are timed in turn: the unpruned model, the same again (the A/A floor),
the pruned models, and the removed regions by themselves. *Realized* is the latency saved, divided by the time that the
removed regions take by themselves under the same backend. Weights and the choice of regions are random: the benchmark
measures what a cut saves, not which cut is good.

Rows go to ``results/bench_speed.jsonl``, the table to ``results/speed.md``. ``cudagraphs`` is inductor's
``reduce-overhead``, for CUDA devices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fxprune
from benchmarks.results import RESULTS, Row, describe_machine, read_rows, replace_rows
from benchmarks.systems import add_options, choose_systems, read_sizes
from fxprune.adapters.registry import choose_adapter
from fxprune.graph.fx_utils import map_tensors
from fxprune.graph.interpreters import Graphs
from fxprune.profiling.interleaved_timing import Ratio, Timing, compute_ratio, interleave
from fxprune.profiling.latency import harmless_inplace_flags
from fxprune.profiling.region_modules import extract_regions
from tests.helpers.captures import capture_copy
from tests.helpers.systems import System

BACKENDS: dict[str, Callable[[nn.Module], Callable[..., object]]] = {
    "eager": lambda module: module,
    "inductor": lambda module: torch.compile(module, dynamic=False),
    "cudagraphs": lambda module: torch.compile(module, dynamic=False, mode="reduce-overhead"),
}
WHOLE, AGAIN = "unpruned", "unpruned again"

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Measure, write rows system by system, render the table."""
    parser = argparse.ArgumentParser(description="Latency of pruned systems, eager and compiled.")
    add_options(parser)
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["eager", "inductor"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images a batch")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for system in choose_systems(options):
        for backend in options.backends:
            for images in options.batches:
                key = f"{system.name}, {backend}, {images} on {options.device}"
                replace_rows(
                    "bench_speed", key, [row | {"model": key} for row in measure(system, backend, images, options)]
                )
                torch._dynamo.reset()
    (RESULTS / "speed.md").write_text("\n".join(render_table(read_rows("bench_speed"))) + "\n", encoding="utf-8")


def measure(system: System, backend: str, images: int, options: argparse.Namespace) -> list[Row]:
    """Measure one row per budget."""
    model, raw = system.build(read_sizes(options), images)
    analysis = fxprune.analyze(model, [raw], criterion="random", seed=options.seed)
    plans = {f"{budget:.0%}": analysis.plan(budget) for budget in options.budgets}
    batch = map_tensors(raw["img"] if isinstance(raw, dict) else raw[0], lambda value: value.to(options.device))
    model = model.to(options.device)
    twin, islands = capture_copy(model, batch, choose_adapter(model, raw, None).whole_model_is_graph)
    prepare = BACKENDS[backend]
    versions = {WHOLE: model, AGAIN: model} | {name: fxprune.apply(model, plan).eval() for name, plan in plans.items()}
    ready = {name: prepare(version) for name, version in versions.items() if name != AGAIN}
    functions: dict[str, Callable[[], object]] = {
        name: partial(ready[WHOLE if name == AGAIN else name], batch) for name in versions
    }
    removed = {region.name: region for plan in plans.values() for region in plan.removed}
    graphs = Graphs.of(twin, islands)
    with torch.inference_mode(), harmless_inplace_flags(graphs):
        for piece in extract_regions(partial(twin, batch), graphs, [row.region for row in removed.values()]):
            module, values = piece.chained(1)
            functions[f"region {piece.region}"] = partial(prepare(module), *values)
        timings = interleave(functions, rounds=options.rounds, warmup=3, device=options.device)
    rows = []
    for (name, plan), budget in zip(plans.items(), options.budgets, strict=True):
        gone = [timings[f"region {region.name}"] for region in plan.removed]
        ratio, floor = compute_ratio(timings[name], timings[WHOLE]), compute_ratio(timings[AGAIN], timings[WHOLE])
        own = compute_ratio(sum_timings(gone), timings[WHOLE])
        rows.append({
            "system": system.name, "backend": backend, "device": options.device, "images": images, "budget": budget,
            "flops_cut": 1 - plan.after.flops / plan.before.flops, "ms": timings[WHOLE].median_ms,
            **ratio_columns("ratio", ratio), **ratio_columns("floor", floor), **ratio_columns("own_time", own),
            "realized": (1 - ratio.median) / own.median, "regions": [region.name for region in plan.removed],
            "rounds": options.rounds, "machine": describe_machine(options.device),
        })  # fmt: skip
        console.print(
            f"{system.name}, {backend}, {images} images, {name}: latency {ratio}, own time {own}, A/A {floor}"
        )
    return rows


def sum_timings(timings: Sequence[Timing]) -> Timing:
    """Sum timings round by round."""
    rounds = zip(*(timing.latency_ms for timing in timings), strict=True)
    return replace(timings[0], name="removed regions", latency_ms=tuple(map(sum, rounds)))


def ratio_columns(name: str, ratio: Ratio) -> dict[str, float]:
    """Make the keys of a row for a ratio: median and quartiles."""
    return {name: ratio.median, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def render_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Render the rows as a Markdown table."""
    names = ("images", "budget", "ms", "FLOPs cut", "regions' own time", "latency cut", "A/A", "realized")
    yield f"| system | backend | {' | '.join(names)} |"
    yield "|---|---|" + "--:|" * len(names)
    for row in rows:
        cut = f"{1 - row['ratio']:.1%} [{1 - row['ratio_high']:.1%}, {1 - row['ratio_low']:.1%}]"
        floor = f"{row['floor']:.2f} [{row['floor_low']:.2f}, {row['floor_high']:.2f}]"
        backend = row["backend"] if row["device"] == "cpu" else f"{row['backend']}, {row['device']}"
        cells = (row["system"], backend, row["images"], f"{row['budget']:.0%}", f"{row['ms']:.1f}",
                 f"{row['flops_cut']:.1%}", f"{row['own_time']:.1%}", cut, floor, f"{row['realized']:.2f}")  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
