"""The command line: ``fxprune COMMAND MODEL``. A command takes groups of options and returns a `Result`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fxprune.attribution.criteria import CRITERIA
from fxprune.cli import options as o
from fxprune.cli import output, steps, tables
from fxprune.cli.calibration_images import check_data, open_images
from fxprune.cli.next_commands import PLAN_FILE, after_analysis, after_pruning
from fxprune.cli.options import (
    BudgetOptions,
    DataOptions,
    HealOptions,
    ModelOptions,
    OutputOptions,
    PruneOptions,
    ScoreOptions,
)
from fxprune.cli.runner import EXIT_STATUS, Command, keep_stdout, report_errors, typer_command, version_line
from fxprune.cli.terminal import Result, Terminal, open_terminal
from fxprune.demo.run import DEMO_CRITERIA, run_demo
from fxprune.planning.ilp import check_budget
from fxprune.planning.plan import Plan
from fxprune.reporting.report import report
from fxprune.rewriting.history import applied_plans
from fxprune.visualize import draw as drawing
from fxprune.visualize.network_view import Drawable

EPILOG = f"""\
[bold]Examples[/]

  fxprune sweep bundled --budgets 0.1,0.2,0.3\n
  fxprune prune ultralytics:best.pt --data data.yaml --out pruned

Exit status: {", ".join(f"{status} {meaning}" for status, meaning in EXIT_STATUS.items())}."""

_DEMO = list(DEMO_CRITERIA)

app = typer.Typer(
    name="fxprune",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog=EPILOG,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status.

    Examples
    --------
    >>> main(["demo", "--budget", "0.2", "--criterion", "fisher"])   # doctest: +SKIP
    0
    """
    if argv is None:
        keep_stdout()
    try:
        with report_errors(open_terminal(), debug=False):
            typer.main.get_command(app)(args=None if argv is None else list(argv), prog_name="fxprune")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except typer.Exit as end:
        return end.exit_code
    return 0


def command(panel: str) -> Callable[[Command], Command]:
    """Register a command under a heading of the help."""

    def register(function: Command) -> Command:
        app.command(name=function.__name__.rstrip("_"), rich_help_panel=panel)(typer_command(function))
        return function

    return register


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(version_line())
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the versions and the device.", metavar="", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Find the blocks that a detector does not need, and remove them."""


@command("Try it")
def demo(
    terminal: Terminal,
    budget: Annotated[float, typer.Option(help="Fraction of the FLOPs to remove.")] = 0.1,
    criterion: Annotated[
        list[str], o.choice("Options", "Criterion to compare; repeat the option for several", CRITERIA)
    ] = _DEMO,
) -> None:
    """Prune the bundled detector by several criteria, and compare the results."""
    run_demo(terminal.out, terminal.err, budget, tuple(criterion))


@command("Inspect")
def analyze(
    terminal: Terminal,
    model: ModelOptions,
    data: DataOptions,
    scores: ScoreOptions,
    budget: BudgetOptions,
    out: OutputOptions,
) -> Result:
    """Score every block that can be removed; mark the blocks that a budget removes."""
    with terminal.progress() as tell:
        network = steps.load_checked_model(model, data, budget, out, tell)
        analysis = steps.run_analysis(network, steps.open_calibration_images(network, data, tell), scores, budget.cost)
        plan = analysis.plan(budget.budget, budget.cost)

        def fill(draft: Path) -> None:
            plan.save(draft / PLAN_FILE)
            output.write_report(report(plan), draft / output.REPORT)

        remark = steps.write_outputs(out, fill, analysis, plan, tell)
    following = after_analysis(model, data, budget.budget, budget.cost, out.out)
    return Result(plan.to_dict(), replace(report(plan), next_steps=following), remark)


@command("Inspect")
def eval_(terminal: Terminal, model: ModelOptions, data: DataOptions, json: o.JsonFlag = False) -> Result:
    """Measure the average precision, as defined by COCO."""
    check_data(model, data, boxes=True)
    with terminal.progress() as tell:
        network = steps.load_model(model, data.device, tell)
        pictures = open_images(network, data, "val")
        scores = steps.evaluate_model(network, pictures, data, "evaluate", tell)
    images = len(pictures.dataset)
    return Result({"model": model.model, "images": images, **scores}, tables.scores_view(scores, images))


@command("Inspect")
def sweep(
    terminal: Terminal,
    model: ModelOptions,
    data: DataOptions,
    scores: ScoreOptions,
    out: OutputOptions,
    budgets: Annotated[str, o.option(o.SCORES_PANEL, "Fractions of the cost, separated by commas.")] = "0.1,0.2,0.3",
    cost: o.CostName = "flops",
    heal: o.HealName = "affine",
) -> Result:
    """Prune by several budgets; show the mAP and the cost of each."""
    check_data(model, data, boxes=True)
    fractions = [check_budget(fraction) for fraction in o.read_numbers(budgets)]
    output.check_folder(out.out, out.force)
    with terminal.progress() as tell:
        network = steps.load_model(model, data.device, tell)
        images = steps.open_calibration_images(network, data, tell, heal)
        analysis = steps.run_analysis(network, images, scores, cost)
        points, plans = steps.sweep_budgets(network, analysis, fractions, cost, data, images, heal)
        document = {
            "model": model.model,
            "cost": cost,
            "heal": heal,
            "settings": dict(analysis.settings),
            "points": [point.to_dict() for point in points],
        }

        def fill(draft: Path) -> None:
            steps.save_sweep(document, plans, draft)

        remark = steps.write_outputs(out, fill, analysis, None, tell)
    return Result(document, tables.sweep_view(points, terminal.out.width, cost, heal), remark)


@command("Inspect")
def draw(
    terminal: Terminal,
    model: ModelOptions,
    picture: Annotated[Path, typer.Argument(help="File to write: .html .svg .png .dot .mmd", show_default=False)],
    data: DataOptions,
    scores: ScoreOptions,
    plan: Annotated[
        Path | None, o.option(o.SCORES_PANEL, "Draw this plan, without an analysis.", metavar="FILE")
    ] = None,
    force: o.ForceFlag = False,
    json: o.JsonFlag = False,
) -> Result:
    """Draw the blocks that can be removed, or those that were removed."""
    if plan is None and model.pruned is None:
        check_data(model, data)
    output.check_file(picture, force)
    with terminal.progress() as tell:
        what: Drawable
        if plan is not None:
            what = Plan.load(plan)
        elif model.pruned is not None:
            what = steps.load_model(model, data.device, tell)
        else:
            network = steps.load_model(model, data.device, tell)
            what = steps.run_analysis(network, steps.open_calibration_images(network, data, tell), scores)
        tell("draw", 0, 1)
        output.check_file(picture, force)  # again: the file may have been created meanwhile
        drawing.draw(what, picture)
    return Result({"picture": str(picture)}, None, f"wrote {picture}")


@command("Prune")
def prune(
    terminal: Terminal,
    model: ModelOptions,
    data: DataOptions,
    scores: ScoreOptions,
    budget: BudgetOptions,
    search: PruneOptions,
    out: OutputOptions,
) -> Result:
    """Analyze, remove blocks, heal (unless --heal none), and save the pruned model."""
    with terminal.progress() as tell:
        network = steps.load_checked_model(model, data, budget, out, tell)
        images = steps.open_calibration_images(network, data, tell, search.heal, search.measure)
        if remark := steps.describe_effort(images.image_count, search):
            terminal.say(remark, head=f"{search.strategy}:")
        pruning = steps.prune_and_heal(network, images, scores, budget, search)
        shown = applied_plans(pruning.model)[-1]
        following = after_pruning(shown, model, data, out.out)
        return steps.save_result(pruning.model, pruning.analysis, shown, out, following, tell)


@command("Prune")
def apply(
    terminal: Terminal,
    model: ModelOptions,
    plan: Annotated[Path, typer.Argument(help="Plan file that analyze --json or --out wrote.", show_default=False)],
    data: DataOptions,
    healing: HealOptions,
    out: OutputOptions,
) -> Result:
    """Apply a plan that analyze made, heal (with --heal) and save the pruned model; measure it if there are images."""
    has_images = data.data is not None or data.images is not None or model.model == "bundled"
    if has_images or healing.heal != "none":
        check_data(model, data)
    output.check_folder(out.out, out.force)
    made = Plan.load(plan)
    with terminal.progress() as tell:
        network = steps.load_model(model, data.device, tell)
        pruned = steps.apply_plan(network, made, tell)
        if has_images:
            images = steps.open_calibration_images(network, data, tell, healing.heal, healing.measure)
            pruned = steps.heal_and_measure(pruned, network, images, healing)
        if healing.heal == "none":
            terminal.say("nothing was healed; --heal affine, with images, mends what is left", head="note:")
        return steps.save_result(pruned, made, None, out, after_pruning(made, model, data, out.out), tell)
