"""What one look at a model gives: regions, scores, costs; and the plans that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations

from fxprune.errors import BudgetError, SettingError
from fxprune.graph.fx_utils import is_within
from fxprune.graph.records import Link, Rejection
from fxprune.planning.ilp import CostItem, check_budget, choose_regions
from fxprune.planning.plan import Candidate, IslandRecord, NodeRecord, Plan, Totals, cost_of
from fxprune.planning.provenance import Provenance
from fxprune.profiling.flops_params import ParameterGroup
from fxprune.runtime.options import check_choice

COSTS = ("flops", "latency", "params", "blocks")
"""What a budget can count."""


def check_cost(cost: object) -> None:
    """Raise `SettingError` unless a cost is known."""
    check_choice("cost", cost, COSTS)


@dataclass(frozen=True)
class Analysis:
    """Regions of a model with scores and costs; makes plans for any budget.

    Attributes
    ----------
    regions : tuple of Candidate
        Every region that can go, in the model's order.
    rejections : tuple of Rejection
        What cannot go, and why.
    nodes : tuple of NodeRecord
        Every node of every island.
    links : tuple of Link
        What flows from island to island.
    islands : tuple of IslandRecord
        Every captured graph.
    before : Totals
        Cost of the whole model.
    settings : mapping
        Criterion, seed, number of images, where targets came from, versions.

    Examples
    --------
    >>> analysis = fxprune.analyze(model, loader)        # doctest: +SKIP
    >>> [analysis.plan(budget).after.flops for budget in (0.1, 0.2)]  # doctest: +SKIP
    """

    regions: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    nodes: tuple[NodeRecord, ...]
    links: tuple[Link, ...]
    islands: tuple[IslandRecord, ...]
    before: Totals
    settings: Provenance
    groups: tuple[ParameterGroup, ...] = field(repr=False)

    def plan(self, budget: float = 0.1, cost: str = "flops") -> Plan:
        """Choose the least important regions whose removal saves a fraction of the whole model's cost.

        Parameters
        ----------
        budget : float
            Fraction in (0, 1): at least this much goes, with least summed importance; among such choices the one
            that overshoots least.
        cost : str
            What it counts: ``"flops"``, ``"latency"`` (milliseconds, if the analysis has measured them), ``"params"``,
            or ``"blocks"`` (candidate regions that lie in no other).

        Returns
        -------
        Plan

        Raises
        ------
        BudgetError
            If the budget is no such fraction, more than can go (says how much could), or so small that its latency
            cannot be measured.
        SettingError
            If the cost is not known, or the latency was not measured.
        """
        fraction = check_budget(budget)
        check_cost(cost)
        scores = [region.score for region in self.regions]
        chosen = set(
            choose_regions(
                scores, self._items(cost), exclusive_sets(self.regions), self._total(cost, fraction), fraction
            )
        )
        regions = tuple(replace(region, removed=index in chosen) for index, region in enumerate(self.regions))
        touched = {region.island for region in regions if region.removed}
        return Plan(
            budget=fraction,
            cost=cost,
            settings=self.settings,
            before=self.before,
            after=self.totals_after(regions),
            islands=tuple(island for island in self.islands if island.name in touched),
            regions=regions,
            rejections=self.rejections,
            nodes=self.nodes,
            links=self.links,
        )

    def _total(self, cost: str, fraction: float) -> float:
        """Cost of the whole model, of which a fraction is to go."""
        total = cost_of(self.before, cost)
        if total is None:
            raise SettingError(
                "cost='latency' needs milliseconds, and none were measured: call fxprune.analyze(...,"
                " latency_backend='eager'), or 'inductor'"
            )
        floor = self.settings.latency_floor if cost == "latency" else 0.0
        if fraction < floor:
            raise BudgetError(
                f"budget {fraction:.3g} of the model's latency cannot be told from noise: timed against itself it"
                f" strays by {floor:.1%}; ask for more, or measure while nothing else runs"
            )
        return total

    def _items(self, cost: str) -> list[CostItem]:
        holders: dict[tuple[str, str], frozenset[int]] = {}
        for index, region in enumerate(self.regions):
            for node in region.nodes:
                key = (region.island, node)
                holders[key] = holders.get(key, frozenset()) | {index}
        if cost == "blocks":
            return [CostItem(1.0, (frozenset([index]),)) for index, region in enumerate(self.regions) if region.block]
        if cost == "latency":
            return [CostItem(region.latency_ms or 0.0, (frozenset([i]),)) for i, region in enumerate(self.regions)]
        if cost == "params":
            nobody: frozenset[int] = frozenset()
            return [
                CostItem(group.params, tuple(holders.get(key, nobody) for key in group.readers))
                for group in self.groups
            ]
        nodes = [(node, holders.get((node.island, node.node))) for node in self.nodes]
        return [CostItem(node.flops, (held,)) for node, held in nodes if held]

    def totals_after(self, regions: tuple[Candidate, ...]) -> Totals:
        """What the model costs without those of its regions that are marked as removed."""
        removed = [region for region in regions if region.removed]
        gone = {(region.island, node) for region in removed for node in region.nodes}
        whole = self.before.latency_ms
        return Totals(
            flops=self.before.flops - sum(region.flops for region in removed),
            params=self.before.params - sum(group.params for group in self.groups if gone.issuperset(group.readers)),
            blocks=self.before.blocks - sum(region.block for region in removed),
            latency_ms=None if whole is None else max(whole - sum(region.latency_ms or 0.0 for region in removed), 0.0),
        )


def exclusive_sets(regions: tuple[Candidate, ...]) -> set[frozenset[int]]:
    """Sets of regions of which at most one can go: those that hold one node, or one that lies in a layer of another."""
    holders: dict[tuple[str, str], set[int]] = {}
    for index, region in enumerate(regions):
        for node in region.nodes:
            holders.setdefault((region.island, node), set()).add(index)
    nested = {
        frozenset((i, j))
        for (i, first), (j, second) in combinations(enumerate(regions), 2)
        if first.island != second.island and (_contains(first, second) or _contains(second, first))
    }
    return {frozenset(some) for some in holders.values() if len(some) > 1} | nested


def _contains(outer: Candidate, inner: Candidate) -> bool:
    return is_within(inner.island, outer.layers)
