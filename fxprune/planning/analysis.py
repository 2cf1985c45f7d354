"""Defines `Analysis`: the regions of a model with scores and costs. It makes a plan for any budget."""

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
"""Known costs."""


def check_cost(cost: object) -> None:
    """Raise `SettingError` if a cost is not known."""
    check_choice("cost", cost, COSTS)


@dataclass(frozen=True)
class Analysis:
    """Regions of a model with scores and costs; makes plans for any budget.

    Attributes
    ----------
    regions : tuple of Candidate
        All regions that can be removed, in the order of the model.
    rejections : tuple of Rejection
        Layers and regions that cannot be removed, with the reasons.
    nodes : tuple of NodeRecord
        All nodes of all islands.
    links : tuple of Link
        Data flow between islands.
    islands : tuple of IslandRecord
        All captured graphs.
    before : Totals
        Costs of the whole model.
    settings : Provenance
        Criterion, seed, number of images, source of the targets, library versions.
    groups : tuple of ParameterGroup
        Parameters, grouped by the nodes that read them.

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
        """Choose the regions to remove: least summed score, and together at least the budget.

        The choice is exact, by an integer program (`fxprune.planning.ilp`).

        Parameters
        ----------
        budget : float
            Fraction, in (0, 1), of the model's cost to remove at least. Among choices with equal summed scores, the
            one that removes least is taken.
        cost : str
            Unit of the budget: ``"flops"``, ``"latency"`` (milliseconds, if the analysis measured them), ``"params"``,
            or ``"blocks"`` (candidates that lie in no other candidate).

        Returns
        -------
        Plan
            The plan. The model is not changed; `fxprune.apply` applies the plan.

        Raises
        ------
        BudgetError
            If the budget is not in (0, 1), if that much cannot be removed (the message says how much can), or if such
            a small part of the latency cannot be measured.
        SettingError
            If the cost is not known, or if the latency was not measured.

        Examples
        --------
        >>> analysis.plan(0.2, "params").removed[0].name           # doctest: +SKIP
        'backbone.body.layer3.4'
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
        """Return the cost of the whole model; the budget is a fraction of it."""
        total = cost_of(self.before, cost)
        if total is None:
            raise SettingError(
                "cost='latency' needs milliseconds, and none were measured: call fxprune.analyze(...,"
                " latency_backend='eager'), or 'inductor'"
            )
        floor = self.settings.latency_floor if cost == "latency" else 0.0
        if fraction < floor:
            raise BudgetError(
                f"budget {fraction:.3g} of the model's latency cannot be told from noise: timed against itself, the"
                f" model strays by {floor:.1%}; give a larger budget, or measure while nothing else runs"
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
            no_candidate: frozenset[int] = frozenset()
            return [
                CostItem(group.params, tuple(holders.get(key, no_candidate) for key in group.readers))
                for group in self.groups
            ]
        nodes = [(node, holders.get((node.island, node.node))) for node in self.nodes]
        return [CostItem(node.flops, (held,)) for node, held in nodes if held]

    def totals_after(self, regions: tuple[Candidate, ...]) -> Totals:
        """Return the costs of the model without the regions that are marked as removed."""
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
    """Return sets of regions that exclude each other: they share a node, or one lies in a layer of another."""
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
