"""What a search believes of regions: scores at first, then what trials have shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

EXPLORATION_SCALES = tuple(2.0**power for power in (-4, -3, -3, -2, -2, -1, -1, 0, 0, 1))
"""Shares of what is uncertain that chance is given, one after the other, to come to a plan that was not tried."""
MAX_LOSS_INCREASE = 1e6
"""Growth of the loss that stands for any greater one, and for a loss that is infinite or no number."""


class LinearSurrogate:
    """What each region's removal is believed to add to ``log(1 + loss increase)``: a Gaussian, updated by trials.

    At first the scores, whose square roots are taken to be proportional to it, each as uncertain as it is large. Where
    there are several opinions it is their geometric mean, the last of what is tried for itself, as uncertain as the
    largest.

    Parameters
    ----------
    prior_scores : sequence of sequence of float
        Scores by one criterion or more.
    seed : int
        Of the draws.
    noise_std : float
        Of the judge, see `fxprune.search.agreement`.
    """

    def __init__(self, prior_scores: Sequence[Sequence[float]], seed: int, noise_std: float) -> None:
        self.noise_std = noise_std
        self.prior_scores = np.maximum(np.asarray(prior_scores, dtype=float), 0.0)
        shapes = np.sqrt(self.prior_scores)
        self.prior_mean, self.prior_std = np.prod(shapes, axis=0) ** (1 / len(shapes)), shapes.max(axis=0)
        if len(shapes) > 1:
            self.prior_scores = np.vstack([self.prior_scores, self.prior_mean**2])
        self.trials: list[tuple[bool, ...]] = []
        self.losses: list[float] = []
        self.rng = np.random.default_rng(seed)

    def observe(self, taken: tuple[bool, ...], loss: float) -> None:
        """Take in what a plan led to."""
        self.trials.append(taken)
        self.losses.append(math.log1p(min(max(loss, -0.5), MAX_LOSS_INCREASE)))

    def trials_without_gain(self) -> int:
        """Trials since one was better than all before it by more than is left unexplained."""
        best, since = math.inf, 0
        for loss in self.losses:
            best, since = (loss, 0) if loss < best - self.noise_std else (best, since + 1)
        return since

    def posterior(self) -> tuple[Any, Any]:
        """Mean (R,) and covariance (R, R) after the trials."""
        x, y = np.asarray(self.trials, dtype=float), np.asarray(self.losses)
        sums = x @ self.prior_mean
        scale = max(float(np.mean(y[sums > 0] / sums[sums > 0])) if (sums > 0).any() else 0.0, 1e-6)
        mean = scale * self.prior_mean
        prior = np.diag(np.maximum(scale * self.prior_std, np.median(mean)) ** 2 + 1e-12)
        gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + self.noise_std**2 * np.eye(len(y)))
        return mean + gain @ (y - x @ mean), prior - gain @ x @ prior

    def propose(self) -> Iterable[Any]:
        """Scores to try: each opinion first, then what is most likely, then with ever more chance in it.

        The longer nothing better was found, the more to begin with.
        """
        if len(self.trials) < len(self.prior_scores):
            yield from self.prior_scores[len(self.trials) :]
        if not self.trials:
            return
        mean, covariance = self.posterior()
        yield np.maximum(mean, 0.0)
        for chance in EXPLORATION_SCALES[min(self.trials_without_gain() // 2, len(EXPLORATION_SCALES) - 2) :]:
            drawn = self.rng.multivariate_normal(mean, chance**2 * covariance, check_valid="ignore")
            yield np.maximum(drawn, 0.0)
