"""How a training goes on, and where it stands."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.errors import SettingError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `steps`, `learning_rate` at most, `seed` of order and mirroring.

    Raises
    ------
    SettingError
        If one of them is no such number.
    """

    steps: int = 400
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise SettingError(f"steps is {self.steps!r}; give a number of steps to train for, from 1")
        rate = self.learning_rate
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate < math.inf:
            raise SettingError(f"learning_rate is {rate!r}; give a positive number such as 1e-3")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SettingError(f"seed is {self.seed!r}; give a whole number from 0")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate at a step, from 1 to `steps`: it falls as a cosine does."""
        return self.learning_rate * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands: the best loss on held-out batches, looks since then, the best weights.

    `lr_scale` is the share of the schedule's learning rate that it goes on with, `warming_up` whether more was never
    too much.
    """

    best: float
    checks_without_gain: int
    lr_scale: float
    warming_up: bool
    best_weights: dict[str, Any]

    def advance(self, found: float, model: nn.Module, astray: bool) -> TrainingState:
        better, rising = found < self.best, self.warming_up and not astray
        return TrainingState(
            min(found, self.best),
            0 if better else self.checks_without_gain + 1,
            self.lr_scale / 2 if astray else min(1.0, 2 * self.lr_scale) if rising else self.lr_scale,
            rising,
            copy_state(model) if better else self.best_weights,
        )


def copy_state(model: nn.Module) -> dict[str, Any]:
    """A model's state, apart from it: tensors, and what modules keep besides."""
    return copy.deepcopy(model.state_dict())
