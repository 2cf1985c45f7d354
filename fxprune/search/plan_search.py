"""The strategies to find a plan: by scores alone, or by trials of many plans that a surrogate proposes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from fxprune.adapters.calls import AdaptedModel, isolated_run
from fxprune.adapters.registry import unwrap
from fxprune.datasets.calibration import CalibrationSet
from fxprune.errors import BudgetError, SettingError, warn_user
from fxprune.healing.heal import heal_student
from fxprune.healing.methods import HealingContext
from fxprune.planning.analysis import Analysis, check_cost
from fxprune.planning.analyzer import AnalysisOptions, Analyzer, analyze_with
from fxprune.planning.ilp import check_budget
from fxprune.planning.plan import Plan, cost_of
from fxprune.rewriting.apply import apply
from fxprune.runtime.distributed import rank_and_world, run_on_rank_zero
from fxprune.runtime.options import check_choice
from fxprune.search.judges import PlanJudge, make_plan_judge
from fxprune.search.surrogate import LinearSurrogate

DEFAULT_TRIES = 16
"""Number of plans that ``"search"`` tries at most."""
HEALING_IMAGES, JUDGING_IMAGES = 64, 192
"""Number of images on which trials are healed, and number of other images on which they are judged.

Scores and the final healing use all images. On 64 judging images, the loss could not separate two plans of ShuffleNetV2
that differ by .02 of mAP."""
MIN_SAVING_SHARE = 0.002
"""Least saving of a region in a plan that is tried, as a share of the saving that the budget requires.

On MobileNetV2, a third of all tries differed from others only by layers that saved less. They were not better."""
RECOVERY_CRITERION, FITTING_METHODS = "fisher_mended", ("affine", "mimic", "mimic_labelled")
"""The criterion that measures the loss change that a fit cannot recover, and the healing methods that start with a fit.
"""


QUICK_METHODS = {"mimic": "affine", "mimic_labelled": "affine"}
"""Healing method of trials, by healing method of the result. A method that is not listed is used for both."""


@dataclass(frozen=True)
class SearchOptions:
    """Budget, cost and strategy; see `fxprune.compile`.

    Raises
    ------
    BudgetError, SettingError
        If the budget is not in (0, 1), the cost or the strategy is not known, or `tries` is not a positive integer.
    """

    budget: float = 0.1
    cost: str = "flops"
    strategy: str = "one_shot"
    tries: int = DEFAULT_TRIES

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_cost(self.cost)
        check_choice("strategy", self.strategy, STRATEGIES)
        if not isinstance(self.tries, int) or isinstance(self.tries, bool) or self.tries < 1:
            raise SettingError(f"tries is {self.tries!r}; give a number of plans to try, 1 or more")


@dataclass(frozen=True)
class PlanSearch:
    """Inputs of a strategy.

    Attributes
    ----------
    model : Module
        The caller's model. It is not changed.
    loader : iterable or CalibrationSet
        Calibration batches. All strategies except ``"one_shot"`` need a `CalibrationSet`.
    options : SearchOptions
        Budget, cost and number of tries.
    analysis : AnalysisOptions
        Options of the analysis.
    trial_method : str
        Healing method of trials.
    """

    model: nn.Module
    loader: Any
    options: SearchOptions
    analysis: AnalysisOptions
    trial_method: str

    def heal_trial(self, pruned: nn.Module, calibration: CalibrationSet, context: HealingContext) -> nn.Module:
        """Heal the pruned model of a trial."""
        if self.trial_method == "none":
            return pruned
        return heal_student(pruned, self.model, calibration, self.trial_method, self.analysis.loss, context)


def find_plan(
    model: nn.Module, loader: Any, options: SearchOptions, analysis: AnalysisOptions, heal: str
) -> tuple[Plan, Analysis]:
    """Find the plan to apply.

    Parameters
    ----------
    model : Module
        The caller's model. It is not changed.
    loader : iterable or CalibrationSet
        Calibration batches. All strategies except ``"one_shot"`` need a `CalibrationSet`.
    options, analysis : SearchOptions, AnalysisOptions
        Options of the search and of the analysis.
    heal : str
        Healing method of the result. Trials are healed by the same method or by a quicker one, see `QUICK_METHODS`.

    Returns
    -------
    plan : Plan
        The best plan.
    analysis : Analysis
        The analysis that the plan comes from.
    """
    search = PlanSearch(model, loader, options, analysis, QUICK_METHODS.get(heal, heal))
    return STRATEGIES[options.strategy](search)


def _plan_once(search: PlanSearch) -> tuple[Plan, Analysis]:
    """Return the plan with the least summed score."""
    analysis = analyze_with(search.model, search.loader, search.analysis)
    options = search.options
    return run_on_rank_zero(partial(analysis.plan, options.budget, options.cost)), analysis


def _search_plans(search: PlanSearch) -> tuple[Plan, Analysis]:
    """Try plans that a surrogate proposes. Each is healed and judged, and the surrogate is updated by the result."""
    options, say = search.options, search.analysis.progress
    whole, prior_scores = _analyze_for_search(search)
    analysis = _without_negligible(whole, options)
    healing_set, judging_set = search.loader.split(HEALING_IMAGES, JUDGING_IMAGES)
    judge, context = _make_judge(search, judging_set), HealingContext()
    names = [region.name for region in analysis.regions]
    surrogate = LinearSurrogate(
        [[scores[name] for name in names] for scores in prior_scores], search.analysis.seed, judge.noise_std
    )
    trials: dict[tuple[bool, ...], tuple[float, Plan]] = {}
    say("search", 0, options.tries)
    try:
        for number in range(1, options.tries + 1):
            plan = run_on_rank_zero(partial(_propose_plan, analysis, surrogate, trials, options))
            if plan is None:
                break
            loss = judge.increase(search.heal_trial(apply(search.model, plan), healing_set, context))
            trials[_removed_mask(plan)] = loss, plan
            surrogate.observe(_removed_mask(plan), loss)
            say("search", number, options.tries)
    except KeyboardInterrupt:
        if not trials or rank_and_world()[1] > 1:
            raise
        _warn_of_interruption(f"after {len(trials)} of {options.tries} plans")
    loss, plan = run_on_rank_zero(lambda: min(trials.values(), key=lambda pair: pair[0]))
    removed = {region.name for region in plan.removed}
    regions = tuple(replace(region, removed=region.name in removed) for region in whole.regions)
    facts = {"strategy": "search", "tried": len(trials), "mended": search.trial_method, **judge.to_settings(loss)}
    return replace(plan, regions=regions, settings=plan.settings.with_entries(**facts)), whole


def _analyze_for_search(search: PlanSearch) -> tuple[Analysis, list[dict[str, float]]]:
    """Capture the model once. Score it by the criterion and, if trials are healed by fits, by `RECOVERY_CRITERION`.

    Returns
    -------
    analysis : Analysis
        Analysis by the criterion.
    prior_scores : list of dict
        For each criterion, the scores by region name. If the second criterion has no score for a region, the score of
        the first is used.
    """
    with isolated_run(unwrap(search.model), grad=True):
        analyzer = Analyzer(search.model, search.loader, search.analysis)
        whole = analyzer.score(search.analysis.criterion)
        own = {region.name: region.score for region in whole.regions}
        if search.trial_method not in FITTING_METHODS:
            return whole, [own]
        recovered = analyzer.score(RECOVERY_CRITERION)
    return whole, [own, own | {region.name: region.score for region in recovered.regions}]


def _propose_plan(
    analysis: Analysis, surrogate: LinearSurrogate, tried: Iterable[Any], options: SearchOptions
) -> Plan | None:
    """Return the best plan by scores that the surrogate proposes, if it was not tried yet; else None."""
    for scores in surrogate.propose():
        regions = zip(analysis.regions, scores, strict=True)
        rescored = replace(analysis, regions=tuple(replace(region, score=float(score)) for region, score in regions))
        plan = rescored.plan(options.budget, options.cost)
        if _removed_mask(plan) not in tried:
            return plan
    return None


def _without_negligible(analysis: Analysis, options: SearchOptions) -> Analysis:
    """Omit the regions that save almost nothing, unless the budget cannot be met without them."""
    least = MIN_SAVING_SHARE * options.budget * (cost_of(analysis.before, options.cost) or 0.0)
    regions = tuple(region for region in analysis.regions if (cost_of(region, options.cost) or 0.0) >= least)
    try:
        replace(analysis, regions=regions).plan(options.budget, options.cost)
    except BudgetError:
        return analysis
    return replace(analysis, regions=regions)


def _removed_mask(plan: Plan) -> tuple[bool, ...]:
    return tuple(region.removed for region in plan.regions)


def _make_judge(search: PlanSearch, calibration: CalibrationSet) -> PlanJudge:
    """Return the judge of plans, on the judging images."""
    original = AdaptedModel.copy_of(search.model, calibration.adapter, search.analysis.seed)
    batches = [(index, batch) for index, batch in enumerate(calibration.own_batches()) if batch is not None]
    return make_plan_judge(original, batches)


def _warn_of_interruption(where: str) -> None:
    warn_user(f"the search was interrupted {where}; this is the best so far")


STRATEGIES: dict[str, Callable[[PlanSearch], tuple[Plan, Analysis]]] = {
    "one_shot": _plan_once,
    "search": _search_plans,
}
"""Strategies by name."""
