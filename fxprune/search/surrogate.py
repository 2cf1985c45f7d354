"""What a search believes of regions: scores at first, then what trials have shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

CHANCES = tuple(2.0**power for power in (-4, -3, -3, -2, -2, -1, -1, 0, 0, 1))
"""Shares of what is uncertain that chance is given, one after the other, to come to a plan that was not tried."""
BROKEN = 1e6
"""Growth of the loss that stands for any greater one, and for a loss that is infinite or no number."""


class Beliefs:
    """What each region's removal is believed to add to ``log(1 + loss increase)``: a Gaussian, updated by trials.

    At first the scores, whose square roots are taken to be proportional to it, each as uncertain as it is large. Where
    there are several opinions it is their geometric mean, the last of what is tried for itself, as uncertain as the
    largest.

    Parameters
    ----------
    opinions : sequence of sequence of float
        Scores by one criterion or more.
    seed : int
        Of the draws.
    noise : float
        Of the judge, see `fxprune.search.agreement`.
    """

    def __init__(self, opinions: Sequence[Sequence[float]], seed: int, noise: float) -> None:
        self.noise = noise
        self.opinions = np.maximum(np.asarray(opinions, dtype=float), 0.0)
        shapes = np.sqrt(self.opinions)
        self.shape, self.most = np.prod(shapes, axis=0) ** (1 / len(shapes)), shapes.max(axis=0)
        if len(shapes) > 1:
            self.opinions = np.vstack([self.opinions, self.shape**2])
        self.trials: list[tuple[bool, ...]] = []
        self.losses: list[float] = []
        self.random = np.random.default_rng(seed)

    def learn(self, taken: tuple[bool, ...], loss: float) -> None:
        """Take in what a plan led to."""
        self.trials.append(taken)
        self.losses.append(math.log1p(min(max(loss, -0.5), BROKEN)))

    def stale(self) -> int:
        """Trials since one was better than all before it by more than is left unexplained."""
        best, since = math.inf, 0
        for loss in self.losses:
            best, since = (loss, 0) if loss < best - self.noise else (best, since + 1)
        return since

    def posterior(self) -> tuple[Any, Any]:
        """Mean (R,) and covariance (R, R) after the trials."""
        x, y = np.asarray(self.trials, dtype=float), np.asarray(self.losses)
        sums = x @ self.shape
        scale = max(float(np.mean(y[sums > 0] / sums[sums > 0])) if (sums > 0).any() else 0.0, 1e-6)
        mean = scale * self.shape
        prior = np.diag(np.maximum(scale * self.most, np.median(mean)) ** 2 + 1e-12)
        gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + self.noise**2 * np.eye(len(y)))
        return mean + gain @ (y - x @ mean), prior - gain @ x @ prior

    def draws(self) -> Iterable[Any]:
        """Scores to try: each opinion first, then what is most likely, then with ever more chance in it.

        The longer nothing better was found, the more to begin with.
        """
        if len(self.trials) < len(self.opinions):
            yield from self.opinions[len(self.trials) :]
        if not self.trials:
            return
        mean, covariance = self.posterior()
        yield np.maximum(mean, 0.0)
        for chance in CHANCES[min(self.stale() // 2, len(CHANCES) - 2) :]:
            drawn = self.random.multivariate_normal(mean, chance**2 * covariance, check_valid="ignore")
            yield np.maximum(drawn, 0.0)
