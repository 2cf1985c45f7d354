"""Which plans: by score alone, step by step with new scores, or proposed by scores and decided by trial."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from torch import nn

from fxprune.analysis import Analysis
from fxprune.beliefs import Beliefs
from fxprune.calibration import Calibration
from fxprune.criteria import RegionScore
from fxprune.detectors.choice import choose_adapter, network_of
from fxprune.driver import analyze, apply
from fxprune.errors import BudgetError, FxpruneWarning, LossError, SettingError
from fxprune.healers import Care
from fxprune.healing import Loss, mend
from fxprune.judging import Judge, judge_of
from fxprune.plan import Plan, Totals
from fxprune.ranks import by_first, rank_and_world
from fxprune.rendering import finite
from fxprune.study import Progress, Study

T = TypeVar("T")

STRIDE = 0.05
"""Share of what a step of ``"greedy"`` finds that it removes; a budget takes as many such steps as it needs."""
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
    shapes: str
    seed: int
    latency_backend: str | None
    tries: int
    progress: Progress

    def __post_init__(self) -> None:
        Study(self.criterion, self.loss, self.shapes, self.seed)  # checks these
        if self.strategy not in STRATEGIES:
            raise SettingError(f"strategy {self.strategy!r} is not known; known: {', '.join(STRATEGIES)}")
        if not isinstance(self.tries, int) or isinstance(self.tries, bool) or self.tries < 1:
            raise SettingError(f"tries is {self.tries!r}; give a number of plans to try, from 1")

    def run(self, model: nn.Module, calibration: Calibration) -> list[Plan]:
        """Find the plans to carry out one after the other."""
        return STRATEGIES[self.strategy](self, model, calibration)

    def analyze(self, model: nn.Module, calibration: Calibration) -> Analysis:
        """Score what is left of a model."""
        return analyze(
            model,
            calibration,
            criterion=self.criterion,
            loss=self.loss,
            shapes=self.shapes,
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


def _one_shot(search: Search, model: nn.Module, calibration: Calibration) -> list[Plan]:
    return [by_first(partial(search.analyze(model, calibration).plan, search.budget, search.cost))]


def _greedy(search: Search, model: nn.Module, calibration: Calibration) -> list[Plan]:
    """Remove a little, mend, score what is left, and so on."""
    steps = steps_to(search.budget)
    mended_on, judged_on = calibration.apart(SAMPLE, OTHERS)
    judge, care = _appoint(Judge, model, judged_on, search), Care()
    plans: list[Plan] = []
    now, whole = model, None
    search.progress("greedy", 0, steps)
    try:
        for step in range(1, steps + 1):
            analysis = _analyzed_after(plans, search, now, calibration)
            if whole is None:
                whole = analysis.before
                analysis.plan(search.budget, search.cost)  # raises now rather than later where it is out of reach
            share = 1 - _left(whole, analysis.before, 1 - (1 - search.budget) ** (step / steps), search.cost)
            if share > 0:
                plan = by_first(partial(analysis.plan, share, search.cost))
                now = search.mended(apply(now, plan), model, mended_on, care)
                facts = {"step": f"{step} of {steps}", "asked": search.budget, "mended": search.mend}
                plans.append(_noted(plan, strategy="greedy", **facts, loss_increase=judge.worse(now)))
            search.progress("greedy", step, steps)
    except KeyboardInterrupt:
        if not plans or rank_and_world()[1] > 1:
            raise
        _warn_of_interruption(f"after {len(plans)} of {steps} steps")
    return plans


def _analyzed_after(plans: Sequence[Plan], search: Search, now: nn.Module, calibration: Calibration) -> Analysis:
    """Score what the steps so far have left; a loss that they have broken is no fault of the batches."""
    try:
        return search.analyze(now, calibration)
    except LossError as error:
        if not plans:
            raise
        gone = ", ".join(region.name for region in plans[-1].removed)
        raise LossError(
            f"without {gone}, which went last, there is no loss to score by what is left; ask for less, or take"
            " strategy='search', which tries other blocks too"
        ) from error


def steps_to(budget: float) -> int:
    """How many steps ``"greedy"`` takes at most."""
    return max(1, math.ceil(math.log(1 - budget) / math.log(1 - STRIDE) - 1e-9))


def _left(whole: Totals, now: Totals, budget: float, cost: str) -> float:
    """What share of the present cost may stay."""
    return float((1 - budget) * _total(whole, cost) / _total(now, cost))


def _total(totals: Totals, cost: str) -> float:
    return float(getattr(totals, {"latency": "latency_ms"}.get(cost, cost)))


def _search(search: Search, model: nn.Module, calibration: Calibration) -> list[Plan]:
    """Let scores propose whole plans, judge each once mended, and learn from that what scores are worth."""
    whole = search.analyze(model, calibration)
    analysis = _worth_trying(whole, search)
    mended_on, judged_on = calibration.apart(SAMPLE, OTHERS)
    judge, care = _appoint(judge_of, model, judged_on, search), Care()
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
    return [_noted(plan, strategy="search", tried=len(found), mended=search.mend, **judge.note(loss))]


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
    name = {"latency": "latency_ms", "blocks": "block"}.get(search.cost, search.cost)
    least = SLIGHT * search.budget * _total(analysis.before, search.cost)
    regions = tuple(region for region in analysis.regions if (getattr(region, name) or 0) >= least)
    try:
        replace(analysis, regions=regions).plan(search.budget, search.cost)
    except BudgetError:
        return analysis
    return replace(analysis, regions=regions)


def _taken(plan: Plan) -> tuple[bool, ...]:
    return tuple(region.removed for region in plan.regions)


def _appoint(kind: Callable[..., T], model: nn.Module, calibration: Calibration, search: Search) -> T:
    """A judge of some kind, on a sample of the images."""
    adapter = choose_adapter(network_of(model), calibration.first_raw, search.loss)
    return kind(model, adapter, list(calibration.own(model, adapter)), search.seed)


def _noted(plan: Plan, **facts: Any) -> Plan:
    return replace(plan, settings={**plan.settings, **finite(facts)})


def _warn_of_interruption(where: str) -> None:
    warnings.warn(f"the search was interrupted {where}; this is the best so far", FxpruneWarning, stacklevel=5)


STRATEGIES: dict[str, Callable[[Search, nn.Module, Calibration], list[Plan]]] = {
    "one_shot": _one_shot,
    "greedy": _greedy,
    "search": _search,
}
"""Strategies by name."""
