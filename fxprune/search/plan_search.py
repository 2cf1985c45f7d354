"""Which plan: the best by score alone, or the best of several that scores propose and trials compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from fxprune.adapters.registry import choose_adapter, unwrap
from fxprune.attribution.criteria import RegionScore
from fxprune.datasets.calibration import Calibration
from fxprune.errors import BudgetError, FxpruneWarning, SettingError
from fxprune.healing.heal import Loss, heal_student
from fxprune.healing.loss_change import LossChange
from fxprune.healing.methods import HealingContext
from fxprune.planning.analysis import Analysis
from fxprune.planning.analyzer import Study, analyze
from fxprune.planning.plan import Plan, cost_of
from fxprune.rewriting.apply import apply
from fxprune.runtime.distributed import rank_and_world, run_on_rank_zero
from fxprune.runtime.json_text import replace_nonfinite
from fxprune.runtime.options import check_choice
from fxprune.runtime.progress import Progress
from fxprune.search.agreement import DetectionAgreement, make_plan_judge
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


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search, see `fxprune.compile`; `trial_method` is the healing that a plan gets before it is judged.

    Raises
    ------
    SettingError
        If the strategy is not known, or `tries` is no positive number.
    """

    strategy: str
    budget: float
    cost: str
    criterion: str | RegionScore
    trial_method: str
    loss: Loss | None
    seed: int
    latency_backend: str | None
    tries: int
    progress: Progress

    def __post_init__(self) -> None:
        Study(self.criterion, self.loss, self.seed)  # checks these
        check_choice("strategy", self.strategy, STRATEGIES)
        if not isinstance(self.tries, int) or isinstance(self.tries, bool) or self.tries < 1:
            raise SettingError(f"tries is {self.tries!r}; give a number of plans to try, from 1")

    def run(self, model: nn.Module, calibration: Calibration) -> Plan:
        """Find the plan to carry out."""
        return STRATEGIES[self.strategy](self, model, calibration)

    def analyze(self, model: nn.Module, calibration: Calibration) -> Analysis:
        """Score what is left of a model."""
        return analyze(
            model,
            calibration,
            criterion=self.criterion,
            loss=self.loss,
            seed=self.seed,
            latency_backend=self.latency_backend,
            progress=self.progress,
        )

    def prior_scores(self, model: nn.Module, calibration: Calibration, analysis: Analysis) -> list[list[float]]:
        """Scores to propose plans by: those of the analysis, and what regions cost once they are mended."""
        own = [region.score for region in analysis.regions]
        if self.trial_method not in FITTING_METHODS:
            return [own]
        after = replace(self, criterion=RECOVERY_CRITERION, latency_backend=None).analyze(model, calibration)
        scores = {region.name: region.score for region in after.regions}
        return [own, [scores.get(region.name, region.score) for region in analysis.regions]]

    def heal_trial(
        self, pruned: nn.Module, model: nn.Module, calibration: Calibration, care: HealingContext
    ) -> nn.Module:
        """A pruned model after the quick healing."""
        return (
            heal_student(pruned, model, calibration, self.trial_method, self.loss, care)
            if self.trial_method != "none"
            else pruned
        )


def _plan_once(search: SearchSettings, model: nn.Module, calibration: Calibration) -> Plan:
    return run_on_rank_zero(partial(search.analyze(model, calibration).plan, search.budget, search.cost))


def _search_plans(search: SearchSettings, model: nn.Module, calibration: Calibration) -> Plan:
    """Let scores propose whole plans, judge each once mended, and learn from that what scores are worth."""
    whole = search.analyze(model, calibration)
    analysis = _without_negligible(whole, search)
    mended_on, judged_on = calibration.apart(HEALING_IMAGES, JUDGING_IMAGES)
    judge, care = _make_judge(model, judged_on, search), HealingContext()
    beliefs = LinearSurrogate(search.prior_scores(model, calibration, analysis), search.seed, judge.noise_std)
    found: dict[tuple[bool, ...], tuple[float, Plan]] = {}
    search.progress("search", 0, search.tries)
    try:
        for number in range(1, search.tries + 1):
            plan = run_on_rank_zero(partial(_propose_plan, analysis, beliefs, found, search))
            if plan is None:
                break
            loss = judge.increase(search.heal_trial(apply(model, plan), model, mended_on, care))
            found[_removed_mask(plan)] = loss, plan
            beliefs.observe(_removed_mask(plan), loss)
            search.progress("search", number, search.tries)
    except KeyboardInterrupt:
        if not found or rank_and_world()[1] > 1:
            raise
        _warn_of_interruption(f"after {len(found)} of {search.tries} plans")
    loss, plan = run_on_rank_zero(lambda: min(found.values(), key=lambda pair: pair[0]))
    gone = {region.name for region in plan.removed}
    plan = replace(plan, regions=tuple(replace(region, removed=region.name in gone) for region in whole.regions))
    return _with_provenance(
        plan, strategy="search", tried=len(found), mended=search.trial_method, **judge.to_settings(loss)
    )


def _propose_plan(
    analysis: Analysis, beliefs: LinearSurrogate, found: Iterable[Any], search: SearchSettings
) -> Plan | None:
    """The best plan by what is believed, drawn at random; one that was not tried, or None."""
    for scores in beliefs.propose():
        regions = zip(analysis.regions, scores, strict=True)
        believed = replace(analysis, regions=tuple(replace(region, score=float(score)) for region, score in regions))
        plan = believed.plan(search.budget, search.cost)
        if _removed_mask(plan) not in found:
            return plan
    return None


def _without_negligible(analysis: Analysis, search: SearchSettings) -> Analysis:
    """An analysis without the regions that save next to nothing, unless the budget cannot be met without them."""
    least = MIN_SAVING_SHARE * search.budget * (cost_of(analysis.before, search.cost) or 0.0)
    regions = tuple(region for region in analysis.regions if (cost_of(region, search.cost) or 0.0) >= least)
    try:
        replace(analysis, regions=regions).plan(search.budget, search.cost)
    except BudgetError:
        return analysis
    return replace(analysis, regions=regions)


def _removed_mask(plan: Plan) -> tuple[bool, ...]:
    return tuple(region.removed for region in plan.regions)


def _make_judge(model: nn.Module, calibration: Calibration, search: SearchSettings) -> LossChange | DetectionAgreement:
    """A judge, on a sample of the images."""
    adapter = choose_adapter(unwrap(model), calibration.first_raw, search.loss)
    return make_plan_judge(model, adapter, list(calibration.own(model, adapter)), search.seed)


def _with_provenance(plan: Plan, **facts: Any) -> Plan:
    return replace(plan, settings={**plan.settings, **replace_nonfinite(facts)})


def _warn_of_interruption(where: str) -> None:
    warnings.warn(f"the search was interrupted {where}; this is the best so far", FxpruneWarning, stacklevel=6)


STRATEGIES: dict[str, Callable[[SearchSettings, nn.Module, Calibration], Plan]] = {
    "one_shot": _plan_once,
    "search": _search_plans,
}
"""Strategies by name."""
