"""Runs the demo: prunes the bundled detector by several criteria and compares the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from fxprune.datasets.batches import batches
from fxprune.datasets.evaluation import evaluate
from fxprune.demo.bundled import load_dataset, load_detector
from fxprune.planning.analyzer import AnalysisOptions, analyze_by_criteria
from fxprune.planning.ilp import check_budget
from fxprune.planning.plan import Plan
from fxprune.profiling.interleaved_timing import Ratio, Timing, compute_ratio, interleave
from fxprune.reporting.table_model import format_change, format_quantity
from fxprune.rewriting.apply import apply

DEMO_CRITERIA = ("fisher", "grad_act", "l1", "random")
ROUNDS = 15
TIMED_IMAGES = 8


@dataclass(frozen=True)
class Row:
    """One row of the table of the demo: a model, its COCO figures, and its plan (None: unpruned)."""

    name: str
    model: nn.Module
    scores: Mapping[str, float]
    plan: Plan | None


def run_demo(out: Console, err: Console, budget: float = 0.1, criteria: Sequence[str] = DEMO_CRITERIA) -> list[Row]:
    """Prune the bundled detector by each criterion, evaluate and time all results, and print a table.

    Parameters
    ----------
    out, err : Console
        Consoles for the table and for the progress bars.
    budget : float
        Fraction of FLOPs to remove.
    criteria : sequence of str
        Names from `fxprune.attribution.criteria.CRITERIA`.

    Returns
    -------
    list of Row
        The unpruned detector, then one row per criterion.

    Raises
    ------
    BudgetError
        If the budget is not between 0 and 1, or is too large.
    """
    check_budget(budget)
    model, val = load_detector(), load_dataset("val")
    calibration = load_dataset("calibration")
    out.print(
        f"Pruning {budget:.0%} of the FLOPs of a trained SSDLite-MobileNetV2 detector (composed digits:"
        f" {len(calibration)} calibration images, {len(val)} others to evaluate on)."
    )
    rows: list[Row] = []
    with _progress(err) as progress:
        names = ("unpruned", *criteria)
        task = progress.add_task("capture and score", total=len(val) * len(names) + ROUNDS)
        analyses = analyze_by_criteria(model, batches(model, calibration), criteria, AnalysisOptions())
        for name in names:
            progress.update(task, description=f"prune by {name}" if rows else "evaluate the unpruned detector")
            plan = analyses[name].plan(budget) if name in analyses else None
            pruned = model if plan is None else apply(model, plan)
            scores = evaluate(pruned, val, progress=_make_advance(progress, task))
            rows.append(Row(name, pruned, scores, plan))
        progress.update(task, description="time all of them in turn")
        images = [calibration[index][0] for index in range(TIMED_IMAGES)]
        timings = _time({row.name: row.model for row in rows}, images)
        progress.update(task, completed=len(val) * len(names) + ROUNDS)
    out.print(_table(rows, timings))
    out.print(_explain(rows, timings))
    return rows


@contextmanager
def _progress(err: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        yield progress


def _make_advance(progress: Progress, task: TaskID) -> Callable[[int], None]:
    """Return a function that sets a bar to its present position plus a number of images."""
    start = progress.tasks[task].completed
    return lambda images: progress.update(task, completed=start + images)


def _time(models: Mapping[str, nn.Module], images: list[torch.Tensor]) -> dict[str, Timing]:
    """Time all models in turn on one batch. The unpruned model is timed twice, to measure the noise."""

    def run(model: nn.Module) -> object:
        with torch.inference_mode():
            return model.eval()(images)

    functions = {name: (lambda model=model: run(model)) for name, model in models.items()}
    twice = {"unpruned again": functions["unpruned"], **functions}
    return interleave(twice, rounds=ROUNDS)


def _table(rows: Sequence[Row], timings: Mapping[str, Timing]) -> Table:
    table = Table(box=box.HORIZONTALS, show_lines=True, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("criterion and the\nblocks it removed", overflow="fold", max_width=52)
    for column in ("mAP", "mAP50", "FLOPs", "params", "img/s", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    before = next(row.plan.before for row in rows if row.plan is not None)
    for row in rows:
        cost = before if row.plan is None else row.plan.after
        removed = () if row.plan is None else row.plan.removed
        names = Text("".join(f"\n  {region.name}" for region in removed), style="dim")
        timing = timings[row.name]
        table.add_row(
            Text(row.name, style="bold") + names,
            f"{row.scores['mAP']:.3f}",
            f"{row.scores['mAP50']:.3f}",
            format_quantity(cost.flops) + _format_saving(cost.flops, before.flops),
            format_quantity(cost.params) + _format_saving(cost.params, before.params),
            f"{TIMED_IMAGES / timing.median_ms * 1e3:.0f}",
            _format_speed(compute_ratio(timings["unpruned"], timing)) if row.plan else "1.00×",
        )
    return table


def _format_saving(after: float, before: float) -> str:
    return f"\n{format_change(before, after)}" if after != before else ""


def _format_speed(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}×\n{ratio.low:.2f}–{ratio.high:.2f}"


def _explain(rows: Sequence[Row], timings: Mapping[str, Timing]) -> str:
    unpruned, ours = rows[0], rows[1]
    assert ours.plan is not None
    loss = unpruned.scores["mAP"] - ours.scores["mAP"]
    cut = 1 - ours.plan.after.flops / ours.plan.before.flops
    floor = compute_ratio(timings["unpruned"], timings["unpruned again"])
    speed = compute_ratio(timings["unpruned"], timings[ours.name])
    others = "; ".join(f"{row.name} keeps {row.scores['mAP']:.3f}" for row in rows[2:])
    change = f"{loss:.3f} mAP less" if loss >= 0.0005 else "no loss of mAP"
    within = floor.low <= speed.median <= floor.high
    pace = "its speed did not change beyond the noise" if within else f"it runs at {speed.median:.2f}× the speed"
    return (
        f"{ours.name} removed {cut:.1%} of the FLOPs with {change}, without any training"
        f"{f' ({others})' if others else ''}; {pace}. Speed is the median of {ROUNDS} interleaved rounds, with its"
        f" quartiles; for two timings of the unpruned model it is {floor.low:.2f}–{floor.high:.2f}×."
    )
