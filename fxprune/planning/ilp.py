"""Chooses the regions to remove by an integer program: least summed score, enough cost, no two that overlap."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from fxprune.errors import BudgetError


@dataclass(frozen=True)
class CostItem:
    """A cost that is saved when all nodes that need it are removed.

    Attributes
    ----------
    amount : float
        The cost that is saved.
    removers : tuple of frozenset of int
        For each node that needs it, the set of candidates that remove this node.
    """

    amount: float
    removers: tuple[frozenset[int], ...]


def check_budget(budget: object) -> float:
    """Return a budget as a float.

    Raises
    ------
    BudgetError
        If the budget is not a number with ``0 < budget < 1``.
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 0 < float(budget) < 1:
        raise BudgetError(f"budget must be a fraction between 0 and 1 of the model's cost to remove, got {budget!r}")
    return float(budget)


def choose_regions(
    importance: Sequence[float],
    items: Sequence[CostItem],
    conflicts: Iterable[Collection[int]],
    total: float,
    budget: float,
) -> list[int]:
    """Choose the candidates with the least summed importance that save at least a fraction of the total cost.

    Among choices of equal importance, the one that saves least is taken, to a precision of .001 of the total. An
    importance below 0 counts as 0: if a removal lowers the loss on the calibration images, this is no reason to remove
    more than the budget.

    Parameters
    ----------
    importance : sequence of float
        One number per candidate.
    items : sequence of CostItem
        The costs that can be saved.
    conflicts : iterable of collection of int
        Sets of candidates of which at most one can be removed.
    total : float
        Cost of the whole model, in the unit of the items.
    budget : float
        Fraction of the total, in (0, 1).

    Returns
    -------
    list of int
        Chosen candidates, ascending.

    Raises
    ------
    BudgetError
        If no choice saves that much. The message says how much can be removed at most.

    Examples
    --------
    >>> items = [CostItem(30.0, (frozenset([0]),)), CostItem(20.0, (frozenset([1]),))]
    >>> choose_regions([5.0, 1.0], items, [], total=100.0, budget=0.2)
    [1]
    """
    program = _Program(len(importance), _merge_items(items), {frozenset(some) for some in conflicts}, total)
    weights = np.maximum(np.asarray(importance, dtype=float), 0.0)
    objective = _TIE_BREAK * program.cost
    objective[: len(weights)] += weights * (_OBJECTIVE_SCALE / weights.max() if weights.max() > 0 else 1.0)
    for slack in (0.0, 1e-6, 1e-5):  # the solver meets constraints to 1e-6; its choice is counted exactly
        solution = program.solve(objective, budget + slack)
        if program.saved_share(solution) >= budget:
            return [int(index) for index in np.flatnonzero(solution[: len(importance)] > 0.5)]
    most = program.saved_share(program.solve(-program.cost, None))
    if most < budget:
        raise BudgetError(
            f"budget {budget:.3g} of the model's cost cannot be removed: all regions together give {most:.1%} at most;"
            f" ask for less than {math.floor(most * 1000) / 1000:.3f}"
        )
    raise BudgetError(f"budget {budget:.3g} equals, within rounding, the most that can be removed ({most:.6%})")


_OBJECTIVE_SCALE = 1e4
"""The largest importance in the solver's objective. The solver has an absolute tolerance of 1e-6."""
_TIE_BREAK = 1e-3
"""Weight of the whole model's cost in the same objective. It is too small to outweigh a significant difference of
importance. Among ties, the solver removes too much by up to its tolerance divided by this weight, .001 of the cost. A
ten times finer precision takes fifty times as long."""


def _merge_items(items: Sequence[CostItem]) -> list[CostItem]:
    """Sum the items with the same removers; omit those that cannot be saved."""
    sizes: dict[tuple[frozenset[int], ...], float] = {}
    for item in items:
        needs = tuple(sorted(set(item.removers), key=sorted))
        if item.amount > 0 and needs and all(needs):
            sizes[needs] = sizes.get(needs, 0.0) + item.amount
    return [CostItem(size, needs) for needs, size in sizes.items()]


class _Program:
    """The integer program. Variables: one of 0 or 1 per candidate, then one in [0, 1] per joint item.

    An item is joint if several nodes need it, or if its removers do not exclude each other. Any other item is added to
    the costs of its removers.
    """

    def __init__(self, candidates: int, items: list[CostItem], conflicts: set[frozenset[int]], total: float) -> None:
        self.candidates, self.items, self.total = candidates, items, total
        plain = [item for item in items if len(item.removers) == 1 and _is_exclusive(item.removers[0], conflicts)]
        joint = [item for item in items if item not in plain]
        self.variable_count = candidates + len(joint)
        self.cost = np.zeros(self.variable_count)
        for item in plain:
            self.cost[list(item.removers[0])] += item.amount / total
        largest = {some for some in conflicts if len(some) > 1 and not any(some < other for other in conflicts)}
        self.rows = [(self._row(dict.fromkeys(some, 1.0)), -np.inf, 1.0) for some in sorted(largest, key=sorted)]
        for index, item in enumerate(joint, start=candidates):
            self.cost[index] = item.amount / total
            self.rows += self._joint_constraints(index, item, conflicts)

    def _joint_constraints(
        self, index: int, item: CostItem, conflicts: set[frozenset[int]]
    ) -> list[tuple[Any, float, float]]:
        """Return the rows that set an item's variable to 1 if every remover set has a chosen candidate, else to 0."""
        rows = [(self._row(dict.fromkeys(need, 1.0) | {index: -1.0}), 0.0, np.inf) for need in item.removers]
        exclusive = [
            [need] if _is_exclusive(need, conflicts) else [frozenset([one]) for one in need] for need in item.removers
        ]
        for removers in product(*exclusive):
            row = self._row({index: -1.0})
            for some in removers:
                row += self._row(dict.fromkeys(some, 1.0))
            rows.append((row, -np.inf, len(removers) - 1.0))
        return rows

    def _row(self, entries: Mapping[int, float]) -> Any:
        row = np.zeros(self.variable_count)
        row[list(entries)] = list(entries.values())
        return row

    def solve(self, objective: Any, target: float | None) -> Any:
        """Minimize an objective with a saved share of at least `target` (None: any); zeros if there is no solution."""
        rows = self.rows if target is None else [*self.rows, (self.cost, target, np.inf)]
        constraints = []
        if rows:
            matrix, low, high = (np.array(column) for column in zip(*rows, strict=True))
            constraints.append(LinearConstraint(matrix, low, high))
        result = milp(
            objective,
            constraints=constraints,
            integrality=np.arange(self.variable_count) < self.candidates,
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        return result.x if result.x is not None else np.zeros(self.variable_count)

    def saved_share(self, solution: Any) -> float:
        """Return the fraction of the total that a choice saves, counted without the solver's tolerances."""
        chosen = {int(index) for index in np.flatnonzero(solution[: self.candidates] > 0.5)}
        return sum(item.amount for item in self.items if all(need & chosen for need in item.removers)) / self.total


def _is_exclusive(need: frozenset[int], conflicts: set[frozenset[int]]) -> bool:
    return len(need) == 1 or any(need <= some for some in conflicts)
