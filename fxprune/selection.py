"""Which regions go: least importance, enough cost, no two that overlap. Solved exactly as an integer program."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from fxprune.errors import BudgetError


@dataclass(frozen=True)
class Item:
    """Something that is saved when all that needs it is removed.

    Attributes
    ----------
    size : float
        How much is saved.
    needs : tuple of frozenset of int
        One set for each thing that needs it: the candidates that would remove this thing.
    """

    size: float
    needs: tuple[frozenset[int], ...]


def check_budget(budget: object) -> float:
    """Return a budget as a float.

    Raises
    ------
    BudgetError
        If it is no finite number strictly between 0 and 1.
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 0 < float(budget) < 1:
        raise BudgetError(f"budget must be a fraction between 0 and 1 of the model's cost to remove, got {budget!r}")
    return float(budget)


def select(
    importance: Sequence[float],
    items: Sequence[Item],
    conflicts: Sequence[tuple[int, int]],
    total: float,
    budget: float,
) -> list[int]:
    """Choose candidates of least summed importance whose removal saves at least a fraction of the total.

    Among choices of equal importance the one that saves least is taken. Importances below 0 count as 0: that a
    removal lowers the loss of the calibration images is no reason to remove more than was asked for.

    Parameters
    ----------
    importance : sequence of float
        One number a candidate.
    items : sequence of Item
        What can be saved.
    conflicts : sequence of (int, int)
        Pairs of candidates that cannot both go.
    total : float
        Cost of the whole model, in the unit of the items.
    budget : float
        Fraction of it, in (0, 1).

    Returns
    -------
    list of int
        Chosen candidates, ascending.

    Raises
    ------
    BudgetError
        If no choice saves that much; says how much could go at most.
    """
    program = _Program(len(importance), _merged(items), conflicts, total)
    most = program.share(program.solve(np.zeros(program.size), -program.cost, None))
    if most < budget:
        raise BudgetError(
            f"budget {budget:.3g} of the model's cost cannot be removed: its regions together give {most:.1%} at most;"
            f" ask for less than {math.floor(most * 1000) / 1000:.3f}"
        )
    weights = np.maximum(np.asarray(importance, dtype=float), 0.0)
    scale = 1e4 / weights.max() if weights.max() > 0 else 1.0
    objective = np.concatenate([weights * scale, np.zeros(program.size - len(weights))])
    for slack in (0.0, 1e-6, 1e-5):  # the solver keeps constraints to 1e-6; what it chose is counted exactly
        least = program.solve(np.zeros(program.size), objective, budget + slack)
        bound = float(objective @ least) * (1 + 1e-9) + 1e-7
        chosen = program.solve(objective, program.cost, budget + slack, bound)
        for solution in (chosen, least):
            if program.share(solution) >= budget:
                return [int(index) for index in np.flatnonzero(solution[: len(importance)] > 0.5)]
    raise BudgetError(f"budget {budget:.3g} lies within rounding of what can be removed at most ({most:.6%})")


def _merged(items: Sequence[Item]) -> list[Item]:
    """Sum items with the same needs; leave out those that nothing can save."""
    sizes: dict[tuple[frozenset[int], ...], float] = {}
    for item in items:
        needs = tuple(sorted(set(item.needs), key=sorted))
        if item.size > 0 and needs and all(needs):
            sizes[needs] = sizes.get(needs, 0.0) + item.size
    return [Item(size, needs) for needs, size in sizes.items()]


class _Program:
    """Variables: one 0/1 a candidate, then one in [0, 1] an item: how far all that needs it is removed."""

    def __init__(self, candidates: int, items: list[Item], conflicts: Sequence[tuple[int, int]], total: float) -> None:
        self.candidates, self.items, self.total = candidates, items, total
        self.size = candidates + len(items)
        self.cost = np.concatenate([np.zeros(candidates), [item.size / total for item in items]])
        rows: list[tuple[Any, float, float]] = [(self._row({a: 1.0, b: 1.0}), 0.0, 1.0) for a, b in conflicts]
        for index, item in enumerate(items, start=candidates):
            for need in item.needs:
                rows.append((self._row({index: -1.0} | dict.fromkeys(need, 1.0)), 0.0, np.inf))
            together = self._row({index: -1.0})
            for need in item.needs:
                together += self._row(dict.fromkeys(need, 1.0))
            rows.append((together, -np.inf, len(item.needs) - 1.0))
        self.rows = rows

    def _row(self, entries: dict[int, float]) -> Any:
        row = np.zeros(self.size)
        row[list(entries)] = list(entries.values())
        return row

    def solve(self, bounded: Any, objective: Any, target: float | None, bound: float | None = None) -> Any:
        rows = list(self.rows)
        if target is not None:
            rows.append((self.cost, target, np.inf))
        if bound is not None:
            rows.append((bounded, -np.inf, bound))
        matrix, low, high = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
        result = milp(
            objective,
            constraints=[LinearConstraint(matrix, low, high)] if rows else [],
            integrality=np.concatenate([np.ones(self.candidates), np.zeros(len(self.items))]),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        return result.x if result.x is not None else np.zeros(self.size)

    def share(self, solution: Any) -> float:
        """Fraction of the total that a choice really saves, counted without the solver's tolerances."""
        chosen = {int(index) for index in np.flatnonzero(solution[: self.candidates] > 0.5)}
        return sum(item.size for item in self.items if all(need & chosen for need in item.needs)) / self.total
