"""Defines the settings and the state of a training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.errors import SettingError


@dataclass(frozen=True)
class Schedule:
    """Settings of a training.

    Attributes
    ----------
    steps : int
        Number of steps.
    learning_rate : float
        Largest learning rate.
    seed : int
        Seed for the order of batches and for mirroring.

    Raises
    ------
    SettingError
        If a value is out of range.
    """

    steps: int = 400
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise SettingError(f"steps is {self.steps!r}; give a whole number of training steps, from 1")
        rate = self.learning_rate
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate < math.inf:
            raise SettingError(f"learning_rate is {rate!r}; give a positive number such as 1e-3")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SettingError(f"seed is {self.seed!r}; give a whole number from 0")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate at a step, from 1 to `steps`: it falls along half a cosine."""
        return self.learning_rate * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2


@dataclass(frozen=True)
class TrainingState:
    """State of a training after a check of the loss on held-out batches.

    Attributes
    ----------
    best : float
        Best loss on held-out batches.
    checks_without_gain : int
        Number of checks since the best loss.
    lr_scale : float
        Share of the schedule's learning rate for the next steps.
    warming_up : bool
        Whether the training has not diverged yet: then every check doubles `lr_scale`, up to 1.
    best_weights : dict
        State of the model at the best loss.
    """

    best: float
    checks_without_gain: int
    lr_scale: float
    warming_up: bool
    best_weights: dict[str, Any]

    def advance(self, loss: float, model: nn.Module, diverged: bool) -> TrainingState:
        """Return the state after a check."""
        better, warming_up = loss < self.best, self.warming_up and not diverged
        return TrainingState(
            min(loss, self.best),
            0 if better else self.checks_without_gain + 1,
            self.lr_scale / 2 if diverged else min(1.0, 2 * self.lr_scale) if warming_up else self.lr_scale,
            warming_up,
            copy_state(model) if better else self.best_weights,
        )


def copy_state(model: nn.Module) -> dict[str, Any]:
    """Return a deep copy of a model's state: its tensors and the extra state of its modules."""
    return copy.deepcopy(model.state_dict())
