"""The surrogate model of the search: scores first, then the results of trials."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fxprune.healing.loss_change import LossChange
from fxprune.search.surrogate import LinearSurrogate

NOISE = LossChange.noise_std


def test_surrogate_starts_with_the_scores() -> None:
    beliefs = LinearSurrogate([[4.0, 1.0, -2.0]], seed=0, noise_std=NOISE)
    assert [scores.tolist() for scores in beliefs.propose()] == [[4.0, 1.0, 0.0]]


def test_surrogate_proposes_each_prior_and_their_mean_before_drawing() -> None:
    beliefs = LinearSurrogate([[4.0, 1.0, 9.0], [1.0, 1.0, 0.0]], seed=0, noise_std=NOISE)
    between = [pytest.approx(2.0), 1.0, 0.0]
    assert [scores.tolist() for scores in beliefs.propose()] == [[4.0, 1.0, 9.0], [1.0, 1.0, 0.0], between]
    beliefs.observe((True, True, False), 0.5)
    first, second, *_ = [scores.tolist() for scores in beliefs.propose()]
    assert (first, second) == ([1.0, 1.0, 0.0], between)
    mean, covariance = beliefs.posterior()
    assert mean[2] == 0.0  # between nothing and much, and as uncertain as that is
    assert covariance[2, 2] > 4 * covariance[1, 1]


def test_surrogate_weighs_trials_above_scores() -> None:
    beliefs = LinearSurrogate([[1.0, 4.0, 9.0, 16.0]], seed=0, noise_std=NOISE)
    truth = np.array([0.9, 0.1, 0.2, 0.3])  # the one that scores least does most damage
    for taken in ((1, 1, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1), (1, 0, 0, 1), (0, 1, 0, 1), (1, 0, 1, 0)):
        beliefs.observe(tuple(map(bool, taken)), math.expm1(float(truth @ np.array(taken))))
    mean, covariance = beliefs.posterior()
    np.testing.assert_allclose(mean, truth, atol=0.05)
    assert np.all(np.linalg.eigvalsh(covariance) > -1e-9)


def test_surrogate_keeps_untried_regions_uncertain() -> None:
    beliefs = LinearSurrogate([[1.0, 4.0, 9.0]], seed=0, noise_std=NOISE)
    before = None
    for number in range(3):
        beliefs.observe((True, False, False), 0.5)
        _, covariance = beliefs.posterior()
        before = before or covariance[2, 2]
        assert covariance[2, 2] == pytest.approx(before)
        assert covariance[0, 0] < covariance[1, 1]
        assert len(beliefs.trials) == number + 1


def test_surrogate_explores_more_without_improvement() -> None:
    def spread(losses: list[float]) -> float:
        beliefs = LinearSurrogate([[1.0, 2.0, 3.0]], seed=0, noise_std=NOISE)
        for loss in losses:
            beliefs.observe((True, True, False), loss)
        _, first, *_ = beliefs.propose()
        return float(np.abs(first - beliefs.posterior()[0]).max())

    assert LinearSurrogate([[1.0]], 0, NOISE).trials_without_gain() == 0
    assert spread([1.0] * 13) > 2 * spread([1.0])
    assert spread([2.0**-number for number in range(13)]) < 0.5 * spread([1.0] * 13)


def test_surrogate_draws_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[list[float]]:
        beliefs = LinearSurrogate([[1.0, 2.0]], seed, NOISE)
        beliefs.observe((True, False), 0.3)
        return [scores.tolist() for scores in beliefs.propose()]

    assert drawn(0) == drawn(0) != drawn(1)
