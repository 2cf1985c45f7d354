"""Which plan: the best by score alone, or the best of several that scores propose and trials compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from fxprune.adapters.registry import choose_adapter, network_of
from fxprune.attribution.criteria import RegionScore
from fxprune.datasets.calibration import Calibration
from fxprune.errors import BudgetError, FxpruneWarning, SettingError
from fxprune.healing.heal import Loss, mend
from fxprune.healing.loss_change import Judge
from fxprune.healing.methods import Care
from fxprune.planning.analysis import Analysis
from fxprune.planning.analyzer import Study, analyze
from fxprune.planning.plan import Plan, cost_of
from fxprune.rewriting.apply import apply
from fxprune.runtime.distributed import by_first, rank_and_world
from fxprune.runtime.json_text import finite
from fxprune.runtime.options import check_choice
from fxprune.runtime.progress import Progress
from fxprune.search.agreement import Agreement, judge_of
from fxprune.search.surrogate import Beliefs

TRIES = 16
"""Plans that ``"search"`` tries."""
SAMPLE, OTHERS = 64, 192
"""Images that plans are mended on, and others that they are judged on; scores, and the last mending, see all.

On 64 others the loss left two plans of ShuffleNetV2 in doubt of which one costs .02 of mAP more."""
SLIGHT = 0.002
"""Share of what the budget asks for that a region saves at least, if it is to be in a plan that is tried.

On MobileNetV2 a third of all tries differed from others by layers alone that saved less, and were as good or worse."""
MENDED, FITTED = "fisher_mended", ("affine", "mimic")
"""A criterion of what fits cannot mend, and the healings that begin by fits."""


@dataclass(frozen=True)
class Search:
    """Settings of a search, see `fxprune.compile`; `mend` is the healing that a plan gets before it is judged.

    Raises
    ------
    SettingError
        If the strategy is not known, or `tries` is no positive number.
    """

    strategy: str
    budget: float
    cost: str
    criterion: str | RegionScore
    mend: str
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

    def opinions(self, model: nn.Module, calibration: Calibration, analysis: Analysis) -> list[list[float]]:
        """Scores to propose plans by: those of the analysis, and what regions cost once they are mended."""
        own = [region.score for region in analysis.regions]
        if self.mend not in FITTED:
            return [own]
        after = replace(self, criterion=MENDED, latency_backend=None).analyze(model, calibration)
        scores = {region.name: region.score for region in after.regions}
        return [own, [scores.get(region.name, region.score) for region in analysis.regions]]

    def mended(self, pruned: nn.Module, model: nn.Module, calibration: Calibration, care: Care) -> nn.Module:
        """A pruned model after the quick healing."""
        return mend(pruned, model, calibration, self.mend, self.loss, care) if self.mend != "none" else pruned


def _one_shot(search: Search, model: nn.Module, calibration: Calibration) -> Plan:
    return by_first(partial(search.analyze(model, calibration).plan, search.budget, search.cost))


def _search(search: Search, model: nn.Module, calibration: Calibration) -> Plan:
    """Let scores propose whole plans, judge each once mended, and learn from that what scores are worth."""
    whole = search.analyze(model, calibration)
    analysis = _worth_trying(whole, search)
    mended_on, judged_on = calibration.apart(SAMPLE, OTHERS)
    judge, care = _appoint(model, judged_on, search), Care()
    beliefs = Beliefs(search.opinions(model, calibration, analysis), search.seed, judge.noise)
    found: dict[tuple[bool, ...], tuple[float, Plan]] = {}
    search.progress("search", 0, search.tries)
    try:
        for number in range(1, search.tries + 1):
            plan = by_first(partial(_proposed, analysis, beliefs, found, search))
            if plan is None:
                break
            loss = judge.worse(search.mended(apply(model, plan), model, mended_on, care))
            found[_taken(plan)] = loss, plan
            beliefs.learn(_taken(plan), loss)
            search.progress("search", number, search.tries)
    except KeyboardInterrupt:
        if not found or rank_and_world()[1] > 1:
            raise
        _warn_of_interruption(f"after {len(found)} of {search.tries} plans")
    loss, plan = by_first(lambda: min(found.values(), key=lambda pair: pair[0]))
    gone = {region.name for region in plan.removed}
    plan = replace(plan, regions=tuple(replace(region, removed=region.name in gone) for region in whole.regions))
    return _noted(plan, strategy="search", tried=len(found), mended=search.mend, **judge.note(loss))


def _proposed(analysis: Analysis, beliefs: Beliefs, found: Iterable[Any], search: Search) -> Plan | None:
    """The best plan by what is believed, drawn at random; one that was not tried, or None."""
    for scores in beliefs.draws():
        regions = zip(analysis.regions, scores, strict=True)
        believed = replace(analysis, regions=tuple(replace(region, score=float(score)) for region, score in regions))
        plan = believed.plan(search.budget, search.cost)
        if _taken(plan) not in found:
            return plan
    return None


def _worth_trying(analysis: Analysis, search: Search) -> Analysis:
    """An analysis without the regions that save next to nothing, unless the budget cannot be met without them."""
    least = SLIGHT * search.budget * (cost_of(analysis.before, search.cost) or 0.0)
    regions = tuple(region for region in analysis.regions if (cost_of(region, search.cost) or 0.0) >= least)
    try:
        replace(analysis, regions=regions).plan(search.budget, search.cost)
    except BudgetError:
        return analysis
    return replace(analysis, regions=regions)


def _taken(plan: Plan) -> tuple[bool, ...]:
    return tuple(region.removed for region in plan.regions)


def _appoint(model: nn.Module, calibration: Calibration, search: Search) -> Judge | Agreement:
    """A judge, on a sample of the images."""
    adapter = choose_adapter(network_of(model), calibration.first_raw, search.loss)
    return judge_of(model, adapter, list(calibration.own(model, adapter)), search.seed)


def _noted(plan: Plan, **facts: Any) -> Plan:
    return replace(plan, settings={**plan.settings, **finite(facts)})


def _warn_of_interruption(where: str) -> None:
    warnings.warn(f"the search was interrupted {where}; this is the best so far", FxpruneWarning, stacklevel=6)


STRATEGIES: dict[str, Callable[[Search, nn.Module, Calibration], Plan]] = {
    "one_shot": _one_shot,
    "search": _search,
}
"""Strategies by name."""
