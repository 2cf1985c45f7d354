"""The steps that commands share, their progress told: open, analyze, rewrite, evaluate, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fxprune import drawing
from fxprune.analysis import Analysis
from fxprune.commands.data import Pictures, calibration_batches, check_data, check_size, open_pictures
from fxprune.commands.models import open_model
from fxprune.commands.options import BudgetOptions, DataOptions, ModelOptions, OutputOptions, ScoreOptions
from fxprune.commands.output import PICTURE, REPORT, check_folder, write_folder, write_report
from fxprune.commands.tables import Point
from fxprune.commands.terminal import Result, Tell, to_json
from fxprune.detectors.choice import network_of
from fxprune.driver import analyze, apply
from fxprune.errors import BudgetError
from fxprune.evaluation import evaluate
from fxprune.latency import backend_for
from fxprune.plan import Plan
from fxprune.report import report
from fxprune.selection import check_budget
from fxprune.storage import save


def opened(options: ModelOptions, device: str, tell: Tell) -> nn.Module:
    """Build the model."""
    tell("load", 0, 1)
    model = open_model(options, device)
    tell("load", 1, 1)
    return model


def analyzed(model: nn.Module, data: DataOptions, scores: ScoreOptions, tell: Tell, cost: str = "flops") -> Analysis:
    """Analyze a model on its calibration images."""
    pictures = open_pictures(model, data, "calibration")
    loader, images = calibration_batches(model, pictures, data), len(pictures.dataset)

    def counted(stage: str, done: int, total: int | None) -> None:
        if stage == "attribution":
            done, total = min(done * data.batch, images), images
        tell(stage, done, total)
        if (stage, done) == ("capture", 1):
            tell("attribution", 0, images)

    return analyze(
        model,
        loader,
        criterion=scores.criterion,
        shapes=scores.shapes,
        seed=scores.seed,
        latency_backend=backend_for(cost, scores.latency_backend),
        progress=counted,
    )


def planned(
    model: ModelOptions, data: DataOptions, scores: ScoreOptions, budget: BudgetOptions, out: OutputOptions, tell: Tell
) -> tuple[nn.Module, Analysis, Plan]:
    """Refuse what cannot be done, then open a model, analyze it and make its plan."""
    check_data(model, data)
    check_budget(budget.budget)
    check_folder(out.out, out.force)
    network = opened(model, data.device, tell)
    analysis = analyzed(network, data, scores, tell, budget.cost)
    return network, analysis, analysis.plan(budget.budget, budget.cost)


def evaluated(model: nn.Module, pictures: Pictures, data: DataOptions, stage: str, tell: Tell) -> dict[str, float]:
    """Measure a model's average precision."""
    check_size(network_of(model), data.size)
    total = len(pictures.dataset)
    tell(stage, 0, total)
    return evaluate(
        model,
        pictures.dataset,
        labels=pictures.labels,
        image_size=data.size,
        batch_size=data.batch,
        progress=lambda done: tell(stage, done, total),
    )


def rewritten(model: nn.Module, plan: Plan, tell: Tell) -> nn.Module:
    """Carry out a plan."""
    tell("rewrite", 0, 1)
    pruned = apply(model, plan)
    tell("rewrite", 1, 1)
    return pruned


def finished(model: nn.Module, plan: Plan, analysis: Analysis | None, output: OutputOptions, tell: Tell) -> Result:
    """Carry out a plan, write the pruned model with report and picture, and say what was done."""
    pruned = rewritten(model, plan, tell)
    found = report(pruned)

    def fill(draft: Path) -> None:
        save(pruned, draft)
        write_report(found, draft / REPORT)

    remark = written(output, fill, analysis or plan, plan if analysis else None, tell)
    return Result(found.to_dict(), found, remark or "nothing was saved; --out FOLDER saves the pruned model")


def written(
    output: OutputOptions, fill: Callable[[Path], None], what: Analysis | Plan, shown: Plan | None, tell: Tell
) -> str:
    """Write the folder of results with a picture, if one is asked for, and return a remark on it."""
    if output.out is None:
        return ""

    def fill_all(draft: Path) -> None:
        fill(draft)
        drawing.draw(what, draft / PICTURE, plan=shown)

    tell("write", 0, 1)
    write_folder(output.out, output.force, fill_all)
    tell("write", 1, 1)
    return f"wrote {output.out}"


def swept(
    model: nn.Module, analysis: Analysis, budgets: Sequence[float], cost: str, data: DataOptions, tell: Tell
) -> tuple[list[Point], dict[float, Plan]]:
    """Evaluate the model as it is and at every budget; a budget that cannot be met is a point that says so."""
    pictures = open_pictures(model, data, "val")
    points = [Point(0.0, analysis.before, (), evaluated(model, pictures, data, "unpruned", tell))]
    plans = {}
    for budget in budgets:
        try:
            plan = analysis.plan(budget, cost)
        except BudgetError as error:
            points.append(Point(budget, None, refusal=str(error)))
            continue
        scores = evaluated(apply(model, plan), pictures, data, f"budget {budget:g}", tell)
        points.append(Point(budget, plan.after, tuple(region.name for region in plan.removed), scores))
        plans[budget] = plan
    return points, plans


def save_sweep(document: Any, plans: dict[float, Plan], draft: Path) -> None:
    """Write a sweep, and a plan for each budget."""
    (draft / "sweep.json").write_text(to_json(document), encoding="utf-8")
    for budget, plan in plans.items():
        plan.save(draft / f"plan-{budget:g}.json")
