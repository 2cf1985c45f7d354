"""Defines `LinearSurrogate`, which predicts the loss increase of a plan from scores and from earlier trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

EXPLORATION_SCALES = tuple(2.0**power for power in (-4, -3, -3, -2, -2, -1, -1, 0, 0, 1))
"""Factors of the standard deviation of random draws. They are used in turn until a plan results that was not tried."""
MAX_LOSS_INCREASE = 1e6
"""Upper limit of the loss increase. It is also used for a loss that is infinite or NaN."""


class LinearSurrogate:
    """Bayesian linear regression: each removed region adds a weight to ``log(1 + loss increase)``.

    The weights have a Gaussian prior. Its mean is proportional to the square root of the score. Its standard deviation
    equals its mean, and is at least the median of all means. With scores by several criteria, the mean comes from their
    geometric mean, and the standard deviation from the largest. The geometric mean is then also tried as scores of its
    own, after the others.

    Parameters
    ----------
    prior_scores : sequence of sequence of float
        Scores of the R regions, by one or more criteria.
    seed : int
        Seed of the random draws.
    noise_std : float
        Standard deviation of the error of the regression, see `DetectionAgreement` and `LossChange`.
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

    def observe(self, removed: tuple[bool, ...], loss: float) -> None:
        """Add the result of a trial: the removed regions (R,) and the loss increase."""
        self.trials.append(removed)
        self.losses.append(math.log1p(min(max(loss, -0.5), MAX_LOSS_INCREASE)))

    def trials_without_gain(self) -> int:
        """Return the number of trials since the last one that was better than all before by more than `noise_std`."""
        best, since = math.inf, 0
        for loss in self.losses:
            best, since = (loss, 0) if loss < best - self.noise_std else (best, since + 1)
        return since

    def posterior(self) -> tuple[Any, Any]:
        """Return the mean (R,) and the covariance (R, R) of the weights, given the trials."""
        x, y = np.asarray(self.trials, dtype=float), np.asarray(self.losses)
        sums = x @ self.prior_mean
        scale = max(float(np.mean(y[sums > 0] / sums[sums > 0])) if (sums > 0).any() else 0.0, 1e-6)
        mean = scale * self.prior_mean
        prior = np.diag(np.maximum(scale * self.prior_std, np.median(mean)) ** 2 + 1e-12)
        gain = prior @ x.T @ np.linalg.inv(x @ prior @ x.T + self.noise_std**2 * np.eye(len(y)))
        return mean + gain @ (y - x @ mean), prior - gain @ x @ prior

    def propose(self) -> Iterable[Any]:
        """Yield scores (R,) to make plans from.

        First the prior scores that were not tried. Then the mean of the posterior, then random draws from it with
        increasing standard deviation (Thompson sampling). The more trials without gain, the larger the first one.
        """
        if len(self.trials) < len(self.prior_scores):
            yield from self.prior_scores[len(self.trials) :]
        if not self.trials:
            return
        mean, covariance = self.posterior()
        yield np.maximum(mean, 0.0)
        for factor in EXPLORATION_SCALES[min(self.trials_without_gain() // 2, len(EXPLORATION_SCALES) - 2) :]:
            draw = self.rng.multivariate_normal(mean, factor**2 * covariance, check_valid="ignore")
            yield np.maximum(draw, 0.0)
