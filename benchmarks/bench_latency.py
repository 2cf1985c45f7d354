"""Predicted and measured cuts of latency.

    python -m benchmarks.bench_latency [MODEL ...] [--untrained] [--backends eager inductor] [--rounds 31]

For each detector plans by ``fisher`` are made with budgets of latency. The latency that a cut saves is predicted in two
ways and measured:

- ``nodes``: the share of every node under an interpreter;
- ``pieces``: every region extracted and timed by itself, once and several times in a row;
- measured: the pruned, the unpruned and again the unpruned detector (the A/A floor), timed in turn.

All are timed on the first calibration batch. The plan uses the way of its backend in
`fxprune.profiling.latency.BACKENDS`, which is bold in the table.

Score thresholds are raised so that detectors find no boxes; ``--boxes`` leaves them as they are. A detector broken by a
cut finds boxes everywhere, and suppressing them may take longer than the cut saves. Otherwise latency does not depend
on the weights: ``--untrained`` takes random ones, with which other regions are the least important.

Rows go to ``results/bench_latency.jsonl``, the table to ``results/latency.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

import fxprune
from benchmarks.results import RESULTS, Row, describe_machine, read_rows, replace_rows
from benchmarks.subjects import TWIN, UNPRUNED, Subject, add_options, load_subjects
from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.adapters.registry import detector_adapter
from fxprune.errors import BudgetError
from fxprune.graph.interpreters import Graphs
from fxprune.planning.analysis import Analysis
from fxprune.profiling.interleaved_timing import Ratio, compute_ratio, interleave
from fxprune.profiling.latency import (
    BACKENDS,
    Backend,
    Probe,
    ProbeInputs,
    backend_copy,
    compiled_probe,
    frozen_eval_mode,
    measure_latency,
    node_probe,
)
from tests.helpers.captures import capture_copy

PROBES: Mapping[str, Callable[[ProbeInputs], Probe]] = {"nodes": node_probe, "pieces": compiled_probe}
FLAGS = {"untrained": "untrained", "boxes": "with boxes"}
MAX_RELATIVE_ERROR = 0.15
"""The goal: largest difference of the predicted and the measured cut, divided by the measured one."""


def main(argv: list[str] | None = None) -> None:
    """Measure the detectors asked for and render the table of all rows."""
    parser = argparse.ArgumentParser(description="Predicted and measured cuts of latency.")
    add_options(parser)
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["eager"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--untrained", action="store_true", help="random weights")
    parser.add_argument("--boxes", action="store_true", help="leave score thresholds as they are")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in load_subjects(options):
        if not options.boxes:
            suppress_detections(subject.model)
        for backend in options.backends:
            key = ", ".join([subject.name, backend, *list_flags(vars(options))])
            replace_rows("bench_latency", key, [row | {"model": key} for row in measure(subject, backend, options)])
            torch._dynamo.reset()
    (RESULTS / "latency.md").write_text("\n".join(render_table()) + "\n", encoding="utf-8")


def list_flags(options: Mapping[str, Any]) -> Iterator[str]:
    """List the flags in a row or in options, in words."""
    return (said for flag, said in FLAGS.items() if options.get(flag))


def suppress_detections(model: nn.Module) -> None:
    """Raise the score thresholds of torchvision's detectors above all scores; networks of ultralytics have none."""
    for part in model.modules():
        if hasattr(part, "score_thresh"):
            part.score_thresh = 2.0  # type: ignore[assignment]


def measure(subject: Subject, backend: str, options: argparse.Namespace) -> Iterator[Row]:
    """Measure one row per budget that can be met."""
    batches = subject.batches()
    analysis = fxprune.analyze(subject.model, batches, latency_backend=backend)
    adapter = detector_adapter(subject.model)
    batch = adapter.normalize(subject.model, batches[0])
    predicted = {name: predict_ms(subject, analysis, backend, name, adapter, batch) for name in PROBES}
    plans = dict(make_plans(analysis, options.budgets))
    versions = {budget: fxprune.apply(subject.model, plan) for budget, plan in plans.items()}
    ratios, ms = time_all(subject.model, versions, BACKENDS[backend], adapter, batch, options.rounds)
    for budget, plan in plans.items():
        ratio, floor = ratios[budget], ratios[TWIN]
        row = {
            "detector": subject.name, "backend": backend, "budget": budget, "images": batch.count, "ms": ms,
            "flops_cut": 1 - plan.after.flops / plan.before.flops, "latency_cut": 1 - ratio.median,
            "latency_cut_low": 1 - ratio.high, "latency_cut_high": 1 - ratio.low,
            "floor": floor.median, "floor_low": floor.low, "floor_high": floor.high, "error": ratio.error,
            "boxes": options.boxes, "untrained": options.untrained, "removed": [region.name for region in plan.removed],
            "rounds": options.rounds, "machine": describe_machine(options.device),
        }  # fmt: skip
        for name, (whole, own) in predicted.items():
            row[name] = sum(own[region.name] for region in plan.removed) / whole
        print(row)
        yield row


def predict_ms(
    subject: Subject, analysis: Analysis, backend: str, probe: str, adapter: Adapter, batch: Batch
) -> tuple[float, Mapping[str, float]]:
    """Predict the milliseconds of the whole model and of every region by one probe.

    They are in the analysis if its backend uses that probe, else they are measured.
    """
    known = BACKENDS[backend]
    if known.probe is PROBES[probe]:
        assert analysis.before.latency_ms is not None
        return analysis.before.latency_ms, {region.name: region.latency_ms or 0.0 for region in analysis.regions}
    other = replace(known, probe=PROBES[probe])
    model, islands = capture_copy(subject.model, batch.images, adapter.whole_model_is_graph)
    graphs = Graphs.of(model, islands)
    twin = backend_copy(subject.model, other)
    found = measure_latency(other, twin, model, graphs, [row.region for row in analysis.regions], adapter, batch)
    assert found.whole_ms is not None
    return found.whole_ms, found.regions_ms


def make_plans(analysis: Analysis, budgets: list[float]) -> Iterator[tuple[float, fxprune.Plan]]:
    """Make a plan for each budget of latency. Budgets that cannot be met are printed and left out."""
    for budget in budgets:
        try:
            yield budget, analysis.plan(budget, "latency")
        except BudgetError as error:
            print(f"{budget:.0%}: {error}")


def time_all(
    model: nn.Module, versions: Mapping[float, nn.Module], backend: Backend, adapter: Adapter, batch: Batch, rounds: int
) -> tuple[dict[Any, Ratio], float]:
    """Time all versions in turn.

    Returns
    -------
    ratios : dict
        Latency over the unpruned model's, of every pruned version and of the unpruned model timed again.
    ms : float
        Of the unpruned model.
    """
    named = {UNPRUNED: model, **{str(budget): version for budget, version in versions.items()}}
    twins = {name: backend_copy(one, backend) for name, one in named.items()}
    with torch.no_grad(), backend.context(), ExitStack() as stack:
        for twin in twins.values():
            stack.enter_context(frozen_eval_mode(twin))
        functions = {name: partial(adapter.predict, twin, batch) for name, twin in twins.items()}
        timings = interleave({**functions, TWIN: functions[UNPRUNED]}, rounds=rounds, warmup=3, device=device_of(model))
    base = timings[UNPRUNED]
    return {key: compute_ratio(timings[str(key)], base) for key in (*versions, TWIN)}, base.median_ms


def render_table() -> Iterator[str]:
    """Render the rows as a Markdown table."""
    names = ("images", "ms", "budget", "FLOPs cut", "by nodes", "by pieces", "latency cut", "A/A", "off by", "")
    yield f"| detector | backend | {' | '.join(names)} |"
    yield "|---|---|" + "--:|" * (len(names) - 1) + "---|"
    for row in read_rows("bench_latency"):
        yield f"| {' | '.join(format_cells(row))} |"


def format_cells(row: Mapping[str, Any]) -> Iterator[str]:
    """Format the cells of a row."""
    own = next(name for name, probe in PROBES.items() if probe is BACKENDS[row["backend"]].probe)
    yield ", ".join([row["detector"], *list_flags(row)])
    yield row["backend"]
    yield str(row["images"])
    yield f"{row['ms']:.1f}"
    yield f"{row['budget']:.0%}"
    yield f"{row['flops_cut']:.1%}"
    for name in PROBES:
        yield f"**{row[name]:.1%}**" if name == own else f"{row[name]:.1%}"
    yield f"{row['latency_cut']:.1%} [{row['latency_cut_low']:.1%}, {row['latency_cut_high']:.1%}]"
    yield f"{row['floor']:.3f} [{row['floor_low']:.3f}, {row['floor_high']:.3f}]"
    off, noise = row[own] / row["latency_cut"] - 1, row["error"] / abs(row["latency_cut"])
    yield f"{off:+.0%} ± {noise:.0%}"
    yield "too noisy" if noise > MAX_RELATIVE_ERROR else "met" if abs(off) <= MAX_RELATIVE_ERROR else "missed"


if __name__ == "__main__":
    main()
