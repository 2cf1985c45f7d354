"""The integer program compared with brute force."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxprune.errors import BudgetError
from fxprune.planning.ilp import CostItem, check_budget, choose_regions

Instance = tuple[list[float], list[CostItem], list[tuple[int, int]], float, float]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Small selection problems, items shared between candidates among them."""
    count = draw(st.integers(1, 6))
    importance = draw(st.lists(st.integers(0, 9).map(float), min_size=count, max_size=count))
    need = st.frozensets(st.integers(0, count - 1), max_size=3)
    item = st.builds(
        lambda size, needs: CostItem(float(size), tuple(needs)), st.integers(1, 20), st.lists(need, max_size=2)
    )
    items = draw(st.lists(item, min_size=1, max_size=8))
    pairs = list(combinations(range(count), 2))
    conflicts = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=4)) if pairs else []
    return importance, items, conflicts, 40.0, draw(st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.8]))


def saved(items: list[CostItem], chosen: set[int]) -> float:
    return sum(item.amount for item in items if item.removers and all(need & chosen for need in item.removers))


def feasible(instance: Instance) -> list[set[int]]:
    importance, items, conflicts, total, budget = instance
    subsets = chain.from_iterable(combinations(range(len(importance)), k) for k in range(len(importance) + 1))
    sets = [set(subset) for subset in subsets]
    free = [chosen for chosen in sets if not any(len(set(some) & chosen) > 1 for some in conflicts)]
    return [chosen for chosen in free if saved(items, chosen) >= budget * total]


@settings(max_examples=150, deadline=None)
@given(instances())
def test_choose_regions_minimizes_importance_then_overshoot(instance: Instance) -> None:
    importance, items, conflicts, total, budget = instance
    possible = feasible(instance)
    if not possible:
        with pytest.raises(BudgetError, match="at most"):
            choose_regions(importance, items, conflicts, total, budget)
        return
    chosen = set(choose_regions(importance, items, conflicts, total, budget))
    least = min(sum(importance[i] for i in subset) for subset in possible)
    cheapest = min(saved(items, s) for s in possible if sum(importance[i] for i in s) == least)
    assert chosen in possible
    assert sum(importance[i] for i in chosen) == least
    assert saved(items, chosen) == cheapest


def test_choose_regions_removes_no_more_for_negative_importance() -> None:
    items = [CostItem(10.0, (frozenset([0]),)), CostItem(10.0, (frozenset([1]),))]
    assert len(choose_regions([-5.0, -1.0], items, [], 100.0, 0.1)) == 1


def test_shared_weights_are_saved_with_their_last_reader_only() -> None:
    shared = CostItem(50.0, (frozenset([0]), frozenset([1])))
    assert choose_regions([1.0, 1.0, 9.0], [shared, CostItem(20.0, (frozenset([2]),))], [], 100.0, 0.3) == [0, 1]


def test_choose_regions_distinguishes_scores_of_very_different_size() -> None:
    items = [CostItem(10.0, (frozenset([i]),)) for i in range(4)]
    assert choose_regions([1e-12, 3e-12, 1e6, 2e-12], items, [], 100.0, 0.2) in ([0, 3], [0, 1], [1, 3])
    assert choose_regions([5.0, 1.0, 1e4, 2.0], items, [], 100.0, 0.2) == [1, 3]


@pytest.mark.parametrize("budget", [0, 1, -0.1, 1.5, float("nan"), "0.1", None, True])
def test_check_budget_refuses_what_is_no_fraction(budget: object) -> None:
    with pytest.raises(BudgetError, match="between 0 and 1"):
        check_budget(budget)


def test_infeasible_budget_error_says_what_is_possible() -> None:
    with pytest.raises(BudgetError, match=r"30\.0% at most"):
        choose_regions([1.0], [CostItem(30.0, (frozenset([0]),))], [], 100.0, 0.5)
