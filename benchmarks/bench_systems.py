"""Regions of each system, the largest fraction of FLOPs that can be removed, and a plan with a budget of 10 %.

    python -m benchmarks.bench_systems [--all] [--systems NAME ...] [--detector-px 320]

Weights are random, and so are the scores. Whether the budget can be met, by which kinds of regions and with what
overshoot, does not depend on the weights. Which of several equal blocks is removed does. Rows go to
``results/bench_systems.jsonl``; a Markdown table is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.optimize import Bounds, LinearConstraint, milp

import fxprune
from benchmarks.systems import add_options, choose_systems, read_sizes, write_rows
from fxprune.planning.analysis import Analysis, exclusive_sets
from tests.helpers.systems import Sizes, System

BUDGET = 0.1
BATCH_IMAGES = 2


def find_largest_share(analysis: Analysis) -> float:
    """Find the largest fraction of a model's FLOPs that any choice of its regions removes.

    Regions that do not conflict share no node, so their FLOPs add up. The choice is a maximum-weight independent set,
    which is solved exactly.
    """
    flops = np.array([region.flops for region in analysis.regions]) / analysis.before.flops
    rivals = exclusive_sets(analysis.regions)
    rows = np.zeros((len(rivals), len(flops)))
    for row, some in zip(rows, rivals, strict=True):
        row[list(some)] = 1
    limits = [LinearConstraint(rows, -np.inf, 1)] if rivals else []
    result = milp(-flops, constraints=limits, integrality=np.ones_like(flops), bounds=Bounds(0, 1))
    return float(flops @ np.round(result.x))


def measure(system: System, sizes: Sizes) -> dict[str, Any]:
    """Analyze one system and plan for the budget. If that fails, the row has the error."""
    model, batch = system.build(sizes, BATCH_IMAGES)
    row: dict[str, Any] = {"system": system.name, "family": system.family}
    start = time.perf_counter()
    try:
        analysis = fxprune.analyze(model, [batch])
    except fxprune.FxpruneError as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    row["analyze_s"] = round(time.perf_counter() - start, 2)
    row["islands"] = len(analysis.islands)
    row["regions"], row["blocks"] = len(analysis.regions), analysis.before.blocks
    row["rejections"] = len(analysis.rejections)
    row["gflops"] = round(analysis.before.flops / 1e9, 3)
    row["largest_share"] = round(find_largest_share(analysis), 4)
    return row | plan_budget(analysis)


def plan_budget(analysis: Analysis) -> dict[str, Any]:
    """Plan for the budget; gives the removed regions, or why there is no plan."""
    start = time.perf_counter()
    try:
        plan = analysis.plan(BUDGET)
    except fxprune.BudgetError as error:
        return {"budget": BUDGET, "removed": [], "refused": str(error)}
    return {
        "budget": BUDGET,
        "removed": [{"name": region.name, "kind": region.kind} for region in plan.removed],
        "flops_removed": round(1 - plan.after.flops / plan.before.flops, 4),
        "params_removed": round(1 - plan.after.params / plan.before.params, 4),
        "plan_s": round(time.perf_counter() - start, 3),
    }


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """Render rows as a Markdown table."""
    lines = [
        f"| system | regions (outermost) | FLOPs removable at most | a {BUDGET:.0%} budget removes | FLOPs | parameters"
        " | analyze, s |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    return "\n".join([*lines, *map(_render_line, rows)])


def _render_line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['system']} | | | {row['error'].splitlines()[0]} | | | |"
    names = [f"`{gone['name']}`" + (" (drop)" if gone["kind"] == "drop" else "") for gone in row["removed"]]
    shares = [f"{row[key]:.1%}" if key in row else "" for key in ("flops_removed", "params_removed")]
    cells = [
        row["system"],
        f"{row['regions']} ({row['blocks']})",
        f"{row['largest_share']:.1%}",
        ", ".join(names) or row["refused"],
        *shares,
        f"{row['analyze_s']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Measure the systems, write the rows, print the table."""
    parser = argparse.ArgumentParser(description="What can be removed from each system.")
    add_options(parser)
    parser.add_argument("--all", action="store_true", help="more systems than the six")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)

    def rows() -> Iterator[dict[str, Any]]:
        for system in choose_systems(options, options.all):
            with console.status(system.name):
                yield measure(system, read_sizes(options))

    print(render_table(write_rows("bench_systems", rows())))


if __name__ == "__main__":
    main()
