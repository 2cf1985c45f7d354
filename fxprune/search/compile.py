"""Defines `compile`: analyze, plan, apply and heal in one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.adapters.calls import isolated_run
from fxprune.adapters.custom_loss import Loss
from fxprune.adapters.registry import unwrap
from fxprune.attribution.criteria import RegionScore
from fxprune.datasets.calibration import CalibrationSet, open_calibration
from fxprune.healing.heal import heal_with
from fxprune.healing.methods import LABELLED_METHODS, HealingOptions
from fxprune.planning.analysis import Analysis
from fxprune.planning.analyzer import AnalysisOptions
from fxprune.planning.plan import Plan
from fxprune.profiling.latency import choose_backend
from fxprune.rewriting.apply import apply
from fxprune.runtime.distributed import raise_on_all_ranks
from fxprune.runtime.options import refuse_removed_keywords
from fxprune.runtime.progress import Progress, no_progress
from fxprune.search.measurement import MeasuringImages, hold_out_images, measure_pruned, read_images
from fxprune.search.plan_search import DEFAULT_TRIES, SearchOptions, find_plan


@dataclass(frozen=True)
class Pruning:
    """Output of `prune`: the pruned model, the plan that was applied, and the analysis that the plan comes from."""

    model: nn.Module
    plan: Plan
    analysis: Analysis


@refuse_removed_keywords
def compile(
    model: nn.Module,
    calib_loader: Iterable[Any],
    budget: float = 0.1,
    *,
    criterion: str | RegionScore = "fisher",
    cost: str = "flops",
    strategy: str = "one_shot",
    heal: str = "affine",
    loss: Loss | None = None,
    latency_backend: str | None = None,
    seed: int = 0,
    tries: int = DEFAULT_TRIES,
    steps: int = 400,
    measure: bool | Iterable[Any] = True,
    progress: Progress | None = None,
) -> nn.Module:
    """Remove a fraction of a model's cost and heal the pruned model.

    Parameters
    ----------
    model, calib_loader, criterion, loss, latency_backend, seed, progress
        As for `fxprune.analyze`.
    budget : float
        Fraction, in (0, 1), of the model's cost to remove at least.
    cost : str
        Unit of the budget: ``"flops"``, ``"latency"`` (by default in eager mode), ``"params"`` or ``"blocks"``.
    strategy, tries
        ``"one_shot"``: the plan with the least summed score. ``"search"``, for budgets of 0.2 or more: try at most
        `tries` plans, first those of the criterion, of ``"fisher_mended"`` and of their geometric mean. Each is healed
        on 64 images and judged on 192 others (`fxprune.search.judges`). Ctrl-C returns the best plan so far.
    heal, steps
        Healing method, and number of training steps of ``"mimic"`` and ``"mimic_labelled"``; see `fxprune.heal`.
    measure : bool or iterable
        Whether to measure what the result still finds (`fxprune.agreement`, mAP, accuracy) and its milliseconds, on up
        to 64 images: every eighth batch, held out if that is 16 images or more, else calibration images again; or the
        batches of an iterable. With False and ``heal="none"``, batches are read one at a time.

    Returns
    -------
    Module
        The same kind of model, smaller, see `fxprune.apply`; `fxprune.report` lists the removed regions. In several
        processes (`torch.distributed`), all must call it with the same model and loader, and all return the same model.
        Ctrl-C ends a search in several processes.

    Raises
    ------
    FxpruneError
        As for `analyze`, `Analysis.plan`, `apply` and `heal`.

    Examples
    --------
    >>> pruned = fxprune.compile(model, loader, budget=0.3, strategy="search", heal="mimic")   # doctest: +SKIP
    """
    say = progress or no_progress
    analysis = AnalysisOptions(criterion, loss, seed, choose_backend(cost, latency_backend), say)
    healing = HealingOptions(heal, steps, seed=seed, loss=loss, progress=say)
    search = SearchOptions(budget, cost, strategy, tries)
    images = measure if isinstance(measure, bool) else read_images(model, measure, loss, seed)
    return prune(model, calib_loader, search, analysis, healing, images).model


def prune(
    model: nn.Module,
    calib_loader: Any,
    search: SearchOptions,
    analysis: AnalysisOptions,
    healing: HealingOptions,
    measure: bool | MeasuringImages = True,
) -> Pruning:
    """Do what `compile` does, with the options in objects; also return the plan and the analysis."""
    with isolated_run(unwrap(model), grad=True):
        loader: Any = calib_loader
        if search.strategy != "one_shot" or healing.method != "none" or measure is True:
            loader = materialize_calibration(model, calib_loader, analysis)
            if healing.method in LABELLED_METHODS:
                loader.labelled_batches()  # raises now, before the analysis, if a batch has none
        if measure is True:
            loader, measure = hold_out_images(loader)
        plan, whole = find_plan(model, loader, search, analysis, healing.method)
        analysis.progress("rewrite", 0, 1)
        pruned = apply(model, plan)
        analysis.progress("rewrite", 1, 1)
        if healing.method != "none":
            pruned = heal_with(pruned, model, loader, healing)
        if measure:
            measure_pruned(pruned, model, measure, analysis.progress)
    return Pruning(pruned, plan, whole)


def materialize_calibration(model: nn.Module, loader: Any, options: AnalysisOptions) -> CalibrationSet:
    """Read all batches and keep them; those without labels get the original model's confident outputs."""
    with isolated_run(unwrap(model), grad=True), raise_on_all_ranks():
        return open_calibration(model, loader, options.loss, options.seed).keep()
