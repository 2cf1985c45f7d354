"""The steps that commands share, with progress: open, analyze, rewrite, evaluate, write."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.adapters.registry import unwrap
from fxprune.cli.calibration_images import (
    EvaluationImages,
    calibration_batches,
    check_data,
    check_size,
    open_images,
    open_unused_images,
)
from fxprune.cli.models import open_model
from fxprune.cli.options import (
    BudgetOptions,
    DataOptions,
    HealOptions,
    ModelOptions,
    OutputOptions,
    PruneOptions,
    ScoreOptions,
)
from fxprune.cli.output import PICTURE, REPORT, check_folder, write_folder, write_report
from fxprune.cli.tables import Point
from fxprune.cli.terminal import Result, Tell, to_json
from fxprune.datasets.evaluation import evaluate
from fxprune.deploy.save_load import save
from fxprune.errors import BudgetError, FxpruneWarning
from fxprune.healing.heal import heal_with
from fxprune.healing.methods import HealingOptions
from fxprune.planning.analysis import Analysis
from fxprune.planning.analyzer import analyze_with
from fxprune.planning.ilp import check_budget
from fxprune.planning.plan import Plan
from fxprune.reporting.measurement_tables import NextSteps
from fxprune.reporting.report import report
from fxprune.rewriting.apply import apply
from fxprune.search.compile import Pruning, prune
from fxprune.search.measurement import CALIBRATION, GIVEN, HELD_OUT, MeasuringImages, measure_pruned, read_images
from fxprune.search.plan_search import FITTING_METHODS, HEALING_IMAGES, JUDGING_IMAGES, SearchOptions
from fxprune.visualize import draw as drawing
from fxprune.visualize.network_view import Drawable


def load_model(options: ModelOptions, device: str, tell: Tell) -> nn.Module:
    """Build the model."""
    tell("load", 0, 1)
    model = open_model(options, device)
    tell("load", 1, 1)
    return model


@dataclass(frozen=True)
class CalibrationInput:
    """The calibration batches, batches of images that are not among them, and progress that is counted in images."""

    loader: Sequence[Any]
    image_count: int
    batch: int
    tell: Tell
    unused: Sequence[Any] | None = None

    def tell_images(self, stage: str, done: int, total: int | None) -> None:
        """Report the progress of a stage; the progress of the scoring is converted from batches to images."""
        if stage == "attribution":
            done, total = min(done * self.batch, self.image_count), self.image_count
        self.tell(stage, done, total)
        if (stage, done) == ("capture", 1):
            self.tell("attribution", 0, self.image_count)


def open_calibration_images(
    model: nn.Module, data: DataOptions, tell: Tell, heal: str = "none", measure: bool = False
) -> CalibrationInput:
    """Open the calibration images, and others to measure on if `measure` is true and there are any."""
    pictures = open_images(model, data, "calibration", heal)
    others = open_unused_images(model, data, heal) if measure else None
    unused = None if others is None else calibration_batches(model, others, data)
    return CalibrationInput(calibration_batches(model, pictures, data), len(pictures.dataset), data.batch, tell, unused)


def run_analysis(model: nn.Module, images: CalibrationInput, scores: ScoreOptions, cost: str = "flops") -> Analysis:
    """Analyze a model on its calibration images."""
    return analyze_with(model, images.loader, scores.for_analysis(cost, images.tell_images))


def load_checked_model(
    model: ModelOptions, data: DataOptions, budget: BudgetOptions, out: OutputOptions, tell: Tell
) -> nn.Module:
    """Check the options, then build the model."""
    check_data(model, data)
    check_budget(budget.budget)
    check_folder(out.out, out.force)
    return load_model(model, data.device, tell)


def prune_and_heal(
    model: nn.Module, images: CalibrationInput, scores: ScoreOptions, budget: BudgetOptions, options: PruneOptions
) -> Pruning:
    """Prune and heal a model, as `fxprune.compile` does."""
    search = SearchOptions(budget.budget, budget.cost, options.strategy, options.tries)
    healing = HealingOptions(options.heal, options.steps, seed=scores.seed, progress=images.tell_images)
    measure: bool | MeasuringImages = options.measure
    if options.measure and images.unused is not None:
        measure = read_images(model, images.unused, seed=scores.seed, source=HELD_OUT)
    return prune(model, images.loader, search, scores.for_analysis(budget.cost, images.tell_images), healing, measure)


def heal_and_measure(pruned: nn.Module, model: nn.Module, images: CalibrationInput, options: HealOptions) -> nn.Module:
    """Heal a pruned model, and measure it on images that the healing did not use if there are others."""
    if options.heal != "none":
        healing = HealingOptions(options.heal, options.steps, progress=images.tell)
        pruned = heal_with(pruned, model, images.loader, healing)
    if options.measure:
        others, source = images.unused, HELD_OUT
        if others is None:
            others, source = images.loader, GIVEN if options.heal == "none" else CALIBRATION
        measure_pruned(pruned, model, read_images(model, others, source=source), images.tell)
    return pruned


def heal_model(pruned: nn.Module, model: nn.Module, images: CalibrationInput, method: str) -> nn.Module:
    """Heal a pruned model; method ``"none"`` returns it without change."""
    if method == "none":
        return pruned
    return heal_with(pruned, model, images.loader, HealingOptions(method, progress=images.tell))


def describe_effort(images: int, search: PruneOptions) -> str:
    """Return the effort of a search in words; empty if the strategy is not a search."""
    if search.strategy != "search":
        return ""
    tries = search.tries
    saliency, healing = 3 * (search.heal in FITTING_METHODS), 3 * (search.heal != "none")  # labels, loss, gradient
    healed, judged = saliency + healing * tries, 1 + tries  # the original model is judged too
    passes = f"{judged} forward passes over {min(images, JUDGING_IMAGES)}"
    if healed:
        passes = (
            f"{healed} forward passes over {min(images, HEALING_IMAGES)} of them and {judged} over"
            f" {min(images, JUDGING_IMAGES)}"
        )
    passes += ", at most. Ctrl-C stops and returns the best plan so far"
    return f"scores {images} images{' twice' * bool(saliency)}, then tries up to {tries} plans: {passes}"


def evaluate_model(
    model: nn.Module, pictures: EvaluationImages, data: DataOptions, stage: str, tell: Tell
) -> dict[str, float]:
    """Measure a model's average precision."""
    check_size(unwrap(model), data.size)
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


def apply_plan(model: nn.Module, plan: Plan, tell: Tell) -> nn.Module:
    """Apply a plan."""
    tell("rewrite", 0, 1)
    pruned = apply(model, plan)
    tell("rewrite", 1, 1)
    return pruned


def save_result(
    pruned: nn.Module, what: Drawable, shown: Plan | None, output: OutputOptions, following: NextSteps, tell: Tell
) -> Result:
    """Write a pruned model with report and picture, and return the result of the command."""
    summary = replace(report(pruned), next_steps=following)

    def fill(draft: Path) -> None:
        save(pruned, draft)
        write_report(summary, draft / REPORT)

    remark = write_outputs(output, fill, what, shown, tell)
    return Result(summary.to_dict(), summary, remark or "nothing was saved; --out FOLDER saves the pruned model")


def write_outputs(
    output: OutputOptions, fill: Callable[[Path], None], what: Drawable, shown: Plan | None, tell: Tell
) -> str:
    """Write the output folder with a picture, if the user gave a folder, and return a remark about it."""
    if output.out is None:
        return ""

    def fill_all(draft: Path) -> None:
        fill(draft)
        drawing.draw(what, draft / PICTURE, plan=shown)

    tell("write", 0, 1)
    write_folder(output.out, output.force, fill_all)
    tell("write", 1, 1)
    return f"wrote {output.out}"


def sweep_budgets(
    model: nn.Module,
    analysis: Analysis,
    budgets: Sequence[float],
    cost: str,
    data: DataOptions,
    images: CalibrationInput,
    method: str,
) -> tuple[list[Point], dict[float, Plan]]:
    """Evaluate the original model and one pruned model per budget; budgets that cannot be met get the reason."""
    pictures, tell = open_images(model, data, "val"), images.tell
    points = [Point(0.0, analysis.before, (), evaluate_model(model, pictures, data, "unpruned", tell))]
    plans = {}
    for budget in budgets:
        try:
            plan = analysis.plan(budget, cost)
        except BudgetError as error:
            points.append(Point(budget, None, refusal=str(error)))
            continue
        named = replace(images, tell=partial(_tell_named, tell, f" {budget:g}"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "after healing", FxpruneWarning)  # the mAP is measured next
            pruned = heal_model(apply(model, plan), model, named, method)
        scores = evaluate_model(pruned, pictures, data, f"budget {budget:g}", tell)
        points.append(Point(budget, plan.after, tuple(region.name for region in plan.removed), scores))
        plans[budget] = plan
    return points, plans


def _tell_named(tell: Tell, which: str, stage: str, done: int, total: int | None) -> None:
    tell(f"{stage}{which}", done, total)


def save_sweep(document: Any, plans: dict[float, Plan], draft: Path) -> None:
    """Write the results of a sweep, and a plan for each budget."""
    (draft / "sweep.json").write_text(to_json(document), encoding="utf-8")
    for budget, plan in plans.items():
        plan.save(draft / f"plan-{budget:g}.json")
