"""Deeper cuts: what each strategy and each healing keeps of a trained detector, and how long it takes.

    python -m benchmarks.bench_deeper [MODEL ...]                   # composed digits; benchmarks.training.train first
    python -m benchmarks.bench_deeper --cost latency [MODEL ...]    # budgets of milliseconds, on a quiet machine
    python -m benchmarks.bench_deeper --render                      # the table alone

The images come without labels: the detector labels them itself. Rows go to ``results/bench_deeper.jsonl``, one a
detector, strategy, healing, cost and budget; those that are there are not made again, and what another strategy
or budget removed too is not healed again. Seconds are processor time, which other work on the machine hardly changes.
The table is ``results/deeper.md``. What ``affine`` and ``mimic`` leave is kept in the cache folder (see
`benchmarks.training.train`), for whoever compares it with something else.
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
from benchmarks.results import RESULTS, Row, append_row, machine, read_rows
from benchmarks.subjects import Subject, add_options, subjects
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
"""What a budget may cost of mAP."""
JUDGE = "boxes"
"""What plans of a search are judged by now."""
SHOWN = ("none", "norms", "affine", "mimic")
"""The healings that rows are of; ``"norms"`` and the strategy ``"greedy"`` are in old rows alone."""
KEPT = ("affine", "mimic")
"""The healings whose detectors are kept."""

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Measure what the results lack of the detectors asked for, and render the table."""
    parser = argparse.ArgumentParser(description="mAP of deeper cuts by strategy and healing.")
    add_cut_options(parser)
    parser.add_argument("--heals", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--cost", default="flops", choices=COSTS)
    parser.add_argument("--tries", type=int, default=DEFAULT_TRIES)
    parser.add_argument("--steps", type=int, default=400, help="of mimic")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in () if options.render else subjects(options):
        measure(subject, options)
    (RESULTS / "deeper.md").write_text("\n".join(table(read_rows(NAME))) + "\n", encoding="utf-8")


def add_cut_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which of the cuts are meant."""
    add_options(parser)
    parser.set_defaults(calibration=256)
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--render", action="store_true")


def measure(subject: Subject, options: argparse.Namespace) -> None:
    """Make the rows of one detector that are not there yet; each is written as soon as it is known."""
    calibration = materialize_calibration(subject.model, subject.unlabelled(), AnalysisOptions())
    for budget in options.budgets:
        for strategy in options.strategies:
            wanted = [heal for heal in options.heals if not known(subject, strategy, heal, budget, options.cost)]
            if wanted:
                cut(subject, calibration, strategy, wanted, budget, options)


def cut(
    subject: Subject,
    calibration: CalibrationSet,
    strategy: str,
    heals: Sequence[str],
    budget: float,
    options: argparse.Namespace,
) -> None:
    """Find the plans of one strategy and heal what they leave in several ways."""
    try:
        known_before = found_before(subject, strategy, budget, options)
        plans, cost = known_before or find(subject, calibration, strategy, budget, options)
    except fxprune.BudgetError as error:
        console.print(f"{subject.name}: {strategy}, {budget}: {error}")
        return
    pruned = subject.model
    for plan in plans:
        pruned = fxprune.apply(pruned, plan)
    for heal in heals:
        row = facts(subject, strategy, heal, budget, options, plans) | cost | {"unpruned_mAP": subject.unpruned["mAP"]}
        place = place_of(row)
        twin = same_cut(row)
        if twin is None:
            started = time.process_time()
            healed = fxprune.heal(pruned, subject.model, calibration, heal, steps=options.steps)
            row |= {"heal_seconds": time.process_time() - started, **scores_of(subject, healed)}
            if heal in KEPT:
                fxprune.save(healed, place, overwrite=True)
        else:
            row |= {key: twin[key] for key in ("heal_seconds", "mAP", "mAP50")}
            if heal in KEPT and place_of(twin) != place:
                shutil.copytree(place_of(twin), place, dirs_exist_ok=True)
        append_row(NAME, row)
        console.print(
            f"{subject.name}: {options.cost} {budget}, {strategy}, {heal}: mAP {row['mAP']:.3f},"
            f" {row['search_seconds']:.0f} + {row['heal_seconds']:.0f} s"
        )


def find(
    subject: Subject, calibration: CalibrationSet, strategy: str, budget: float, options: argparse.Namespace
) -> tuple[list[Plan], Row]:
    """The plans of a strategy, what they save, and the seconds that it took."""
    started = time.process_time()
    search = SearchOptions(budget, options.cost, strategy, options.tries)
    analysis = AnalysisOptions("fisher", latency_backend=choose_backend(options.cost, None))
    plans = [find_plan(subject.model, calibration, search, analysis, "affine")[0]]
    cost = {
        "flops_cut": 1 - plans[-1].after.flops / plans[0].before.flops,
        "predicted_latency_cut": latency_cut(plans),
        "search_seconds": time.process_time() - started,
    }
    return plans, cost


def found_before(
    subject: Subject, strategy: str, budget: float, options: argparse.Namespace
) -> tuple[list[Plan], Row] | None:
    """The same of a row that there is already."""
    wanted = {"model": subject.name, "strategy": strategy, "budget": budget, "cost": options.cost}
    wanted |= {"tries": options.tries} if strategy == "search" else {}
    rows = (row for row in read_rows(NAME) if strategy == "one_shot" or not is_older(row))
    row = next((row for row in rows if wanted.items() <= row.items()), None)
    if row is None:
        return None
    plans: list[Plan] = []
    model = subject.model
    images = subject.unlabelled()[:1]
    for names in row["regions"]:
        analysis = fxprune.analyze(model, images, criterion="random")
        plans.append(plan_removing(analysis, set(names)))
        model = fxprune.apply(model, plans[-1])
    return plans, {key: row[key] for key in ("flops_cut", "predicted_latency_cut", "search_seconds")}


def place_of(row: Row) -> Path:
    """Where the healed detector that a row is of is kept."""
    return cache_folder() / "deeper" / "-".join(str(row[key]) for key in KEYS)


def known(subject: Subject, strategy: str, heal: str, budget: float, cost: str) -> bool:
    """Whether the results have a row already that is not older than what healing minds now."""
    wanted = (subject.name, strategy, heal, budget, cost)
    return any(wanted == tuple(row[key] for key in KEYS) for row in read_rows(NAME) if not is_older(row))


def is_older(row: Row) -> bool:
    """Whether a row is of before healing minded where deviations matter, or of a search that judged by such healing or
    by the loss."""
    if row["strategy"] == "search" and row.get("judge") != JUDGE:
        return True
    return not row.get("saliency") and (row["heal"] in KEPT or row["strategy"] != "one_shot")


def same_cut(row: Row) -> Row | None:
    """The row of another strategy or budget that removed the same and was healed in the same way, if there is one.

    And if the detector, where it is to be kept, is still there.
    """
    alike = ("model", "heal", "steps", "saliency", "images", "regions", "machine")
    same = (other for other in read_rows(NAME) if all(row[key] == other.get(key) for key in alike))
    return next((other for other in same if row["heal"] not in KEPT or place_of(other).exists()), None)


def facts(
    subject: Subject, strategy: str, heal: str, budget: float, options: argparse.Namespace, plans: Sequence[Plan]
) -> Row:
    """What is known of a row before anything is healed."""
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
        "machine": machine(options.device),
    }


def scores_of(subject: Subject, healed: nn.Module) -> dict[str, float]:
    """Average precision of a healed model."""
    scores = subject.evaluate(healed.eval())
    return {"mAP": scores["mAP"], "mAP50": scores["mAP50"]}


def latency_cut(plans: Sequence[Plan]) -> float | None:
    """What share of the milliseconds the plans count off, where they were measured."""
    first, last = plans[0].before.latency_ms, plans[-1].after.latency_ms
    return None if first is None or last is None else 1 - last / first


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One line a detector, cost, budget and strategy; the mAP that each healing loses, and the seconds it took.

    What is marked † was measured before healing minded where deviations matter, or before searches judged by boxes.
    """
    yield f"| model (mAP) | budget | strategy | {' | '.join(SHOWN)} | goal | search + heal, s |"
    yield "|---|--:|---|" + "--:|" * (len(SHOWN) + 2)
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["cost"], row["budget"], row["strategy"]), {})[row["heal"]] = row
    for (model, cost, budget, strategy), found in sorted(groups.items(), key=str):
        (base,) = {row["unpruned_mAP"] for row in found.values()}
        losses = [loss_of(found[heal]) if heal in found else "" for heal in SHOWN]
        seconds = [f"{found[heal]['heal_seconds']:.0f}" for heal in SHOWN if heal in found]
        searched = max(row["search_seconds"] for row in found.values())
        cells = [f"{model} ({base:.3f})", f"{budget:.0%} {cost}", strategy, *losses, str(GOALS.get(budget, ""))]
        yield f"| {' | '.join(cells)} | {searched:.0f} + {' / '.join(seconds)} |"


def loss_of(row: Row) -> str:
    """What a row lost of mAP, marked if it is older."""
    return f"{round(row['unpruned_mAP'] - row['mAP'], 3) + 0.0:.3f}{'†' if is_older(row) else ''}"


if __name__ == "__main__":
    main()
