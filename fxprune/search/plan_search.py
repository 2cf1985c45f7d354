"""Which plan: the best by score alone, or the best of several that scores propose and trials compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from fxprune.adapters.calls import AdaptedModel, isolated_run
from fxprune.adapters.registry import unwrap
from fxprune.datasets.calibration import CalibrationSet
from fxprune.errors import BudgetError, SettingError
from fxprune.healing.heal import heal_student
from fxprune.healing.methods import HealingContext
from fxprune.planning.analysis import Analysis, check_cost
from fxprune.planning.analyzer import AnalysisOptions, Analyzer, analyze_with
from fxprune.planning.ilp import check_budget
from fxprune.planning.plan import Plan, cost_of
from fxprune.rewriting.apply import apply
from fxprune.runtime.distributed import rank_and_world, run_on_rank_zero
from fxprune.runtime.options import check_choice
from fxprune.runtime.user_warnings import warn_user
from fxprune.search.agreement import PlanJudge, make_plan_judge
from fxprune.search.surrogate import LinearSurrogate

DEFAULT_TRIES = 16
"""Plans that ``"search"`` tries."""
HEALING_IMAGES, JUDGING_IMAGES = 64, 192
"""Images that plans are mended on, and others that they are judged on; scores, and the last mending, see all.

On 64 others the loss left two plans of ShuffleNetV2 in doubt of which one costs .02 of mAP more."""
MIN_SAVING_SHARE = 0.002
"""Share of what the budget asks for that a region saves at least, if it is to be in a plan that is tried.

On MobileNetV2 a third of all tries differed from others by layers alone that saved less, and were as good or worse."""
RECOVERY_CRITERION, FITTING_METHODS = "fisher_mended", ("affine", "mimic")
"""A criterion of what fits cannot mend, and the healings that begin by fits."""


QUICK_METHODS = {"mimic": "affine"}
"""How trials are healed, where the result is healed by a method that takes long."""


@dataclass(frozen=True)
class SearchOptions:
    """How much is removed, and how the plan is found; see `fxprune.compile`.

    Raises
    ------
    BudgetError, SettingError
        If the budget is no fraction, the cost or the strategy is not known, or `tries` is no positive number.
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
            raise SettingError(f"tries is {self.tries!r}; give a number of plans to try, from 1")


@dataclass(frozen=True)
class PlanSearch:
    """One search for a plan.

    Attributes
    ----------
    model : Module
        The caller's.
    loader : iterable or CalibrationSet
        Batches; a search that tries plans needs them to be kept.
    options : SearchOptions
    analysis : AnalysisOptions
    trial_method : str
        How a pruned model is healed before it is judged.
    """

    model: nn.Module
    loader: Any
    options: SearchOptions
    analysis: AnalysisOptions
    trial_method: str

    def heal_trial(self, pruned: nn.Module, calibration: CalibrationSet, context: HealingContext) -> nn.Module:
        """Heal a pruned model quickly, to be judged."""
        if self.trial_method == "none":
            return pruned
        return heal_student(pruned, self.model, calibration, self.trial_method, self.analysis.loss, context)


def find_plan(
    model: nn.Module, loader: Any, options: SearchOptions, analysis: AnalysisOptions, heal: str
) -> tuple[Plan, Analysis]:
    """Find the plan to carry out.

    Parameters
    ----------
    model : Module
        Not changed.
    loader : iterable or CalibrationSet
        Batches; kept ones for any strategy but ``"one_shot"``.
    options, analysis
        What to remove, and how regions are scored.
    heal : str
        How the result will be healed; trials are healed alike, or in a quicker way.

    Returns
    -------
    plan : Plan
    analysis : Analysis
        What it was chosen from.
    """
    search = PlanSearch(model, loader, options, analysis, QUICK_METHODS.get(heal, heal))
    return STRATEGIES[options.strategy](search)


def _plan_once(search: PlanSearch) -> tuple[Plan, Analysis]:
    """Choose the best plan by score alone."""
    analysis = analyze_with(search.model, search.loader, search.analysis)
    options = search.options
    return run_on_rank_zero(partial(analysis.plan, options.budget, options.cost)), analysis


def _search_plans(search: PlanSearch) -> tuple[Plan, Analysis]:
    """Propose whole plans by scores, judge each after healing, and learn from that what scores are worth."""
    options, say = search.options, search.analysis.progress
    whole, prior_scores = _analyze_for_search(search)
    analysis = _without_negligible(whole, options)
    healing_set, judging_set = search.loader.split(HEALING_IMAGES, JUDGING_IMAGES)
    judge, context = _make_judge(search, judging_set), HealingContext()
    names = [region.name for region in analysis.regions]
    surrogate = LinearSurrogate(
        [[scores[name] for name in names] for scores in prior_scores], search.analysis.seed, judge.noise_std
    )
    found: dict[tuple[bool, ...], tuple[float, Plan]] = {}
    say("search", 0, options.tries)
    try:
        for number in range(1, options.tries + 1):
            plan = run_on_rank_zero(partial(_propose_plan, analysis, surrogate, found, options))
            if plan is None:
                break
            loss = judge.increase(search.heal_trial(apply(search.model, plan), healing_set, context))
            found[_removed_mask(plan)] = loss, plan
            surrogate.observe(_removed_mask(plan), loss)
            say("search", number, options.tries)
    except KeyboardInterrupt:
        if not found or rank_and_world()[1] > 1:
            raise
        _warn_of_interruption(f"after {len(found)} of {options.tries} plans")
    loss, plan = run_on_rank_zero(lambda: min(found.values(), key=lambda pair: pair[0]))
    gone = {region.name for region in plan.removed}
    regions = tuple(replace(region, removed=region.name in gone) for region in whole.regions)
    facts = {"strategy": "search", "tried": len(found), "mended": search.trial_method, **judge.to_settings(loss)}
    return replace(plan, regions=regions, settings=plan.settings.with_entries(**facts)), whole


def _analyze_for_search(search: PlanSearch) -> tuple[Analysis, list[dict[str, float]]]:
    """Capture the model once; score it by the criterion and, if trials are fitted, by what fits cannot recover.

    Returns
    -------
    analysis : Analysis
        By the criterion.
    prior_scores : list of dict
        Scores by region and by each criterion. A region without a score of its own keeps that of the first.
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
    analysis: Analysis, surrogate: LinearSurrogate, found: Iterable[Any], options: SearchOptions
) -> Plan | None:
    """Return the best plan by scores that the surrogate draws; one that was not tried, or None."""
    for scores in surrogate.propose():
        regions = zip(analysis.regions, scores, strict=True)
        believed = replace(analysis, regions=tuple(replace(region, score=float(score)) for region, score in regions))
        plan = believed.plan(options.budget, options.cost)
        if _removed_mask(plan) not in found:
            return plan
    return None


def _without_negligible(analysis: Analysis, options: SearchOptions) -> Analysis:
    """Leave out the regions that save next to nothing, unless the budget cannot be met without them."""
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
    """Choose the judge, on the images that plans are judged on."""
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
