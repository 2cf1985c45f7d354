"""The mAP of trained detectors after deeper cuts, by strategy and healing, and the time that each takes.

    python -m benchmarks.bench_deeper [MODEL ...]                   # composed digits; benchmarks.training.train first
    python -m benchmarks.bench_deeper --cost latency [MODEL ...]    # budgets of latency, on a quiet machine
    python -m benchmarks.bench_deeper --render                      # the table alone

Calibration images have no labels; the detector labels them itself. Rows go to ``results/bench_deeper.jsonl``, one per
detector, strategy, healing, cost and budget, the table to ``results/deeper.md``. Rows that exist are not made again. A
cut that removes the same regions as an earlier one is not healed again. Seconds are processor time, which depends
little on other work on the machine.

Detectors healed by ``affine`` and ``mimic`` are kept in the cache folder (`benchmarks.cache`), where other benchmarks
find them.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fxprune
from benchmarks.ablation import plan_removing
from benchmarks.cache import cache_folder
from benchmarks.results import RESULTS, Row, append_row, describe_machine, read_rows
from benchmarks.subjects import Subject, add_options, load_subjects
from fxprune.datasets.calibration import CalibrationSet
from fxprune.healing.methods import METHODS
from fxprune.planning.analyzer import AnalysisOptions
from fxprune.planning.plan import Plan
from fxprune.profiling.latency import choose_backend
from fxprune.search.compile import materialize_calibration
from fxprune.search.plan_search import DEFAULT_TRIES, STRATEGIES, SearchOptions, find_plan

NAME = "bench_deeper"
BUDGETS = (0.1, 0.2, 0.3, 0.4)
COSTS = ("flops", "latency")
KEYS = ("model", "strategy", "heal", "budget", "cost")
GOALS = {0.1: 0.002, 0.2: 0.005, 0.3: 0.015, 0.4: 0.05}
"""For each budget the largest loss of mAP that is a success."""
JUDGE = "boxes"
"""How a search ranks plans in new rows: by the boxes that a pruned detector still finds."""
SHOWN = ("none", "norms", "affine", "mimic")
"""The healings that rows are of; ``"norms"`` and the strategy ``"greedy"`` are in old rows alone."""
KEPT = ("affine", "mimic")
"""Healings whose detectors are kept in the cache folder."""

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Measure the rows that the results lack, and render the table."""
    parser = argparse.ArgumentParser(description="mAP of deeper cuts by strategy and healing.")
    add_cut_options(parser)
    parser.add_argument("--heals", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--cost", default="flops", choices=COSTS)
    parser.add_argument("--tries", type=int, default=DEFAULT_TRIES)
    parser.add_argument("--steps", type=int, default=400, help="of mimic")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in () if options.render else load_subjects(options):
        measure(subject, options)
    (RESULTS / "deeper.md").write_text("\n".join(render_table(read_rows(NAME))) + "\n", encoding="utf-8")


def add_cut_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose detectors, budgets and strategies."""
    add_options(parser)
    parser.set_defaults(calibration=256)
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--render", action="store_true")


def measure(subject: Subject, options: argparse.Namespace) -> None:
    """Measure the rows of one detector that the results lack; each is written at once."""
    calibration = materialize_calibration(subject.model, subject.unlabelled_batches(), AnalysisOptions())
    for budget in options.budgets:
        for strategy in options.strategies:
            wanted = [heal for heal in options.heals if not is_known(subject, strategy, heal, budget, options.cost)]
            if wanted:
                measure_cut(subject, calibration, strategy, wanted, budget, options)


def measure_cut(
    subject: Subject,
    calibration: CalibrationSet,
    strategy: str,
    heals: Sequence[str],
    budget: float,
    options: argparse.Namespace,
) -> None:
    """Find a plan by one strategy, prune, and heal in several ways; writes one row per healing."""
    try:
        known_before = rebuild_plans(subject, strategy, budget, options)
        plans, cost = known_before or find_plans(subject, calibration, strategy, budget, options)
    except fxprune.BudgetError as error:
        console.print(f"{subject.name}: {strategy}, {budget}: {error}")
        return
    pruned = subject.model
    for plan in plans:
        pruned = fxprune.apply(pruned, plan)
    for heal in heals:
        row = (
            settings_columns(subject, strategy, heal, budget, options, plans)
            | cost
            | {"unpruned_mAP": subject.unpruned_scores["mAP"]}
        )
        place = detector_folder(row)
        twin = find_same_cut(row)
        if twin is None:
            started = time.process_time()
            healed = fxprune.heal(pruned, subject.model, calibration, heal, steps=options.steps)
            row |= {"heal_seconds": time.process_time() - started, **score_columns(subject, healed)}
            if heal in KEPT:
                fxprune.save(healed, place, overwrite=True)
        else:
            row |= {key: twin[key] for key in ("heal_seconds", "mAP", "mAP50")}
            if heal in KEPT and detector_folder(twin) != place:
                shutil.copytree(detector_folder(twin), place, dirs_exist_ok=True)
        append_row(NAME, row)
        console.print(
            f"{subject.name}: {options.cost} {budget}, {strategy}, {heal}: mAP {row['mAP']:.3f},"
            f" {row['search_seconds']:.0f} + {row['heal_seconds']:.0f} s"
        )


def find_plans(
    subject: Subject, calibration: CalibrationSet, strategy: str, budget: float, options: argparse.Namespace
) -> tuple[list[Plan], Row]:
    """Find the plans of a strategy; returns them with the columns of a row for savings and seconds."""
    started = time.process_time()
    search = SearchOptions(budget, options.cost, strategy, options.tries)
    analysis = AnalysisOptions("fisher", latency_backend=choose_backend(options.cost, None))
    plans = [find_plan(subject.model, calibration, search, analysis, "affine")[0]]
    cost = {
        "flops_cut": 1 - plans[-1].after.flops / plans[0].before.flops,
        "predicted_latency_cut": predict_latency_cut(plans),
        "search_seconds": time.process_time() - started,
    }
    return plans, cost


def rebuild_plans(
    subject: Subject, strategy: str, budget: float, options: argparse.Namespace
) -> tuple[list[Plan], Row] | None:
    """Make the plans of an existing row again; None if there is no such row."""
    wanted = {"model": subject.name, "strategy": strategy, "budget": budget, "cost": options.cost}
    wanted |= {"tries": options.tries} if strategy == "search" else {}
    rows = (row for row in read_rows(NAME) if strategy == "one_shot" or not is_older(row))
    row = next((row for row in rows if wanted.items() <= row.items()), None)
    if row is None:
        return None
    plans: list[Plan] = []
    model = subject.model
    images = subject.unlabelled_batches()[:1]
    for names in row["regions"]:
        analysis = fxprune.analyze(model, images, criterion="random")
        plans.append(plan_removing(analysis, set(names)))
        model = fxprune.apply(model, plans[-1])
    return plans, {key: row[key] for key in ("flops_cut", "predicted_latency_cut", "search_seconds")}


def detector_folder(row: Row) -> Path:
    """Give the folder of the healed detector of a row."""
    return cache_folder() / "deeper" / "-".join(str(row[key]) for key in KEYS)


def is_known(subject: Subject, strategy: str, heal: str, budget: float, cost: str) -> bool:
    """Whether the results have a row made by the current methods (see `is_older`)."""
    wanted = (subject.name, strategy, heal, budget, cost)
    return any(wanted == tuple(row[key] for key in KEYS) for row in read_rows(NAME) if not is_older(row))


def is_older(row: Row) -> bool:
    """Whether a row was made by an older method.

    Healing without saliency weights, or a search that ranked plans by the loss.
    """
    if row["strategy"] == "search" and row.get("judge") != JUDGE:
        return True
    return not row.get("saliency") and (row["heal"] in KEPT or row["strategy"] != "one_shot")


def find_same_cut(row: Row) -> Row | None:
    """Find a row with the same regions and healing, of another strategy or budget.

    If the healing's detectors are kept, the detector must still be in the cache folder.
    """
    alike = ("model", "heal", "steps", "saliency", "images", "regions", "machine")
    same = (other for other in read_rows(NAME) if all(row[key] == other.get(key) for key in alike))
    return next((other for other in same if row["heal"] not in KEPT or detector_folder(other).exists()), None)


def settings_columns(
    subject: Subject, strategy: str, heal: str, budget: float, options: argparse.Namespace, plans: Sequence[Plan]
) -> Row:
    """Make the columns of a row that are known before healing."""
    return {
        "model": subject.name,
        "criterion": "fisher",
        "strategy": strategy,
        "heal": heal,
        "cost": options.cost,
        "budget": budget,
        "regions": [sorted(region.name for region in plan.removed) for plan in plans],
        "tries": options.tries,
        "steps": options.steps,
        "saliency": True,
        "judge": JUDGE,
        "images": len(subject.calibration),
        "val_images": len(subject.val),
        "machine": describe_machine(options.device),
    }


def score_columns(subject: Subject, healed: nn.Module) -> dict[str, float]:
    """Evaluate a healed model; returns the score columns of a row."""
    scores = subject.evaluate(healed.eval())
    return {"mAP": scores["mAP"], "mAP50": scores["mAP50"]}


def predict_latency_cut(plans: Sequence[Plan]) -> float | None:
    """Predict the fraction of latency that plans save; None if latency was not measured."""
    first, last = plans[0].before.latency_ms, plans[-1].after.latency_ms
    return None if first is None or last is None else 1 - last / first


def render_table(rows: Sequence[Row]) -> Iterator[str]:
    """Render one line per detector, cost, budget and strategy: the mAP that each healing loses, and its seconds.

    Values of older methods are marked † (see `is_older`).
    """
    yield f"| model (mAP) | budget | strategy | {' | '.join(SHOWN)} | goal | search + heal, s |"
    yield "|---|--:|---|" + "--:|" * (len(SHOWN) + 2)
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["cost"], row["budget"], row["strategy"]), {})[row["heal"]] = row
    for (model, cost, budget, strategy), found in sorted(groups.items(), key=str):
        (base,) = {row["unpruned_mAP"] for row in found.values()}
        losses = [format_loss(found[heal]) if heal in found else "" for heal in SHOWN]
        seconds = [f"{found[heal]['heal_seconds']:.0f}" for heal in SHOWN if heal in found]
        searched = max(row["search_seconds"] for row in found.values())
        cells = [f"{model} ({base:.3f})", f"{budget:.0%} {cost}", strategy, *losses, str(GOALS.get(budget, ""))]
        yield f"| {' | '.join(cells)} | {searched:.0f} + {' / '.join(seconds)} |"


def format_loss(row: Row) -> str:
    """Format the mAP that a row lost, marked † if it is older."""
    return f"{round(row['unpruned_mAP'] - row['mAP'], 3) + 0.0:.3f}{'†' if is_older(row) else ''}"


if __name__ == "__main__":
    main()
