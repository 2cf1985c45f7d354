"""The time of a detector by kinds of layers, and the time that a cut of FLOPs saves.

    python -m benchmarks.bench_time [MODEL ...] [--budget 0.1] [--rounds 15]

For each trained detector the time of an inference call is divided into convolutions, other layers of the captured
graphs, and the rest (resizing, anchors, box decoding, suppression). For a cut by ``fisher`` three numbers are compared:
the fraction of FLOPs removed, the fraction of the time that the removed nodes take by themselves, and the fraction of
the latency saved. Nodes are timed one by one by an interpreter. Rows go to ``results/bench_time.jsonl``, the table to
``results/time.md``.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

import fxprune
from benchmarks.results import RESULTS, describe_machine, read_rows, replace_rows
from benchmarks.subjects import TWIN, UNPRUNED, Subject, add_options, load_subjects
from fxprune.adapters.protocol import device_of
from fxprune.adapters.registry import detector_adapter
from fxprune.graph.interpreters import Graphs, NodeName
from fxprune.graph.records import Island
from fxprune.profiling.interleaved_timing import interleave
from fxprune.profiling.node_timer import NodeTimer
from tests.helpers.captures import capture_copy

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)

Times = dict[NodeName, float]


def main(argv: list[str] | None = None) -> None:
    """Measure the detectors asked for and render the table of all rows."""
    parser = argparse.ArgumentParser(description="The time of a detector by kinds of layers, and what a cut saves.")
    add_options(parser)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--timed-images", type=int, default=8)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in load_subjects(options):
        row = measure(subject, options)
        replace_rows("bench_time", subject.name, [row])
        print(row)
    (RESULTS / "time.md").write_text("\n".join(render_table()) + "\n", encoding="utf-8")


def measure(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row: fractions of the time, and what a plan saves."""
    plan = fxprune.analyze(subject.model, subject.batches()).plan(options.budget)
    batch = subject.inference_batch(options.timed_images)
    model, islands = capture_copy(subject.model, batch, detector_adapter(subject.model).whole_model_is_graph)
    with torch.inference_mode():
        times, whole = time_nodes(model, islands, batch, options.rounds)
        pruned = fxprune.apply(subject.model, plan).eval()
    latencies = subject.time_beside({"pruned": pruned}, options.rounds, options.timed_images)
    kinds = {(i.name, node.name): classify_node(i.gm, node) for i in islands for node in i.gm.graph.nodes}
    shares: dict[str, float] = defaultdict(float)
    for key, milliseconds in times.items():
        shares[kinds[key]] += milliseconds / whole
    gone = {(region.island, node) for region in plan.removed for node in region.nodes}
    ratio, floor = latencies.ratio("pruned"), latencies.ratio(TWIN)
    return {
        "model": subject.name,
        "budget": options.budget,
        "ms": latencies.timings[UNPRUNED].median_ms,
        "timed_images": options.timed_images,
        "dense_conv": shares["dense convolution"],
        "depthwise_conv": shares["depthwise convolution"],
        "other_layers": shares["other"],
        "outside": max(0.0, 1 - sum(shares.values())),
        "flops_cut": 1 - plan.after.flops / plan.before.flops,
        "node_time_cut": sum(times.get(key, 0.0) for key in gone) / whole,
        "latency_cut": 1 - ratio.median,
        "latency_cut_low": 1 - ratio.high,
        "latency_cut_high": 1 - ratio.low,
        "floor_low": floor.low,
        "floor_high": floor.high,
        "removed": [region.name for region in plan.removed],
        "machine": describe_machine(str(subject.device)),
    }


def time_nodes(model: nn.Module, islands: list[Island], batch: Any, rounds: int) -> tuple[Times, float]:
    """Time the nodes of a model.

    Returns
    -------
    times : dict
        Median milliseconds of every node in one call, summed over its uses.
    whole_ms : float
        Median milliseconds of a call in which nodes are not timed.
    """
    timer = NodeTimer(Graphs.of(model, islands), device_of(model), time.perf_counter)
    functions = {"whole": partial(model, batch), "nodes": partial(timer.run, partial(model, batch))}
    timings = interleave(functions, rounds=rounds, device=device_of(model))
    runs = timer.times()[-rounds:]
    return {key: median(run.nodes_ms[key] for run in runs) for key in runs[0].nodes_ms}, timings["whole"].median_ms


def classify_node(gm: fx.GraphModule, node: fx.Node) -> str:
    """Classify a node: ``dense convolution``, ``depthwise convolution`` or ``other``."""
    layers = list(gm.get_submodule(str(node.target)).modules()) if node.op == "call_module" else []
    groups = [layer.groups for layer in layers if isinstance(layer, CONVOLUTIONS)]
    if node.target is functional.conv2d:
        groups.append(int(node.kwargs.get("groups", 1)))  # type: ignore[arg-type]
    if not groups:
        return "other"
    return "depthwise convolution" if min(groups) > 1 else "dense convolution"


def render_table() -> Iterator[str]:
    """Render the rows as a Markdown table."""
    names = (
        "ms",
        "dense conv",
        "depthwise",
        "other layers",
        "outside",
        "FLOPs cut",
        "own time",
        "latency cut",
        "realized",
    )
    yield f"| model | {' | '.join(names)} |"
    yield "|---|" + "--:|" * len(names)
    for row in read_rows("bench_time"):
        yield "| " + " | ".join(format_cells(row)) + " |"


def format_cells(row: Mapping[str, Any]) -> Iterator[str]:
    """Format the cells of a row; *realized* is the latency cut divided by the FLOPs cut."""
    yield row["model"]
    yield f"{row['ms']:.0f}"
    for key in ("dense_conv", "depthwise_conv", "other_layers", "outside"):
        yield f"{row[key]:.0%}"
    yield f"{row['flops_cut']:.1%}"
    yield f"{row['node_time_cut']:.1%}"
    yield f"{row['latency_cut']:.1%} [{row['latency_cut_low']:.1%}, {row['latency_cut_high']:.1%}]"
    yield f"{row['latency_cut'] / row['flops_cut']:.2f}"


if __name__ == "__main__":
    main()
