"""Healing by training: step size, order of images, optimizer, and when it stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.adapters.protocol import Batch
from fxprune.errors import LossError, ModelError, SettingError
from fxprune.healing import methods
from fxprune.healing.distillation import feature_mimic
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.distillation.feature_mimic import INITIAL_LR_SCALE, split_batch
from fxprune.healing.distillation.muon import (
    BLOCK_ROWS,
    NEWTON_SCHULZ_COEFFICIENTS,
    NEWTON_SCHULZ_ITERATIONS,
    MuonAdamW,
    newton_schulz,
)
from fxprune.healing.distillation.schedule import TrainingState, copy_state
from fxprune.planning.analysis import Analysis
from tests.helpers.healing import equal, far, images, pair_of, tiny_with_statistics, without
from tests.helpers.hostile import assert_refused
from tests.helpers.models import labelled, pixels, tiny

LONG: dict[str, Any] = {"steps": 20, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_with_statistics()


@pytest.fixture(scope="module")
def cut(model: nn.Module, analysis: Analysis) -> nn.Module:
    return fxprune.apply(model, without(analysis, "blocks.0", "blocks.2"))


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[TrainingState]:
    """The states that a training goes through."""
    seen: list[TrainingState] = []
    after = TrainingState.advance

    def noted(self: TrainingState, found: float, model: nn.Module, astray: bool) -> TrainingState:
        seen.append(after(self, found, model, astray))
        return seen[-1]

    monkeypatch.setattr(TrainingState, "advance", noted)
    return seen


def test_mimic_that_only_harms_returns_the_initial_weights(
    model: nn.Module, cut: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = images(9)[7:8]
    harmed = fxprune.heal(cut, model, images(9), "mimic", steps=5, learning_rate=10.0)
    assert far(model, harmed, held) <= far(model, cut, held)
    monkeypatch.setattr(methods, "INTERPOLATIONS", (1.0,))
    began = fxprune.heal(cut, model, images(9), "affine")
    assert equal(began, fxprune.heal(cut, model, images(9), "mimic", steps=5, learning_rate=10.0))
    assert not equal(began, fxprune.heal(cut, model, images(9), "mimic", steps=5, learning_rate=1e-3))


def test_mimic_halves_a_learning_rate_that_is_too_high(
    model: nn.Module, cut: nn.Module, states: list[TrainingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Images are noise: no weights tell them apart, so any growth of the loss counts as divergence.
    monkeypatch.setattr(feature_mimic, "DIVERGENCE_RATIO", 1.0)
    before = fxprune.heal(cut, model, images(9), "affine")
    healed = fxprune.heal(cut, model, images(9), steps=64, learning_rate=0.5)
    assert states[-1].lr_scale < INITIAL_LR_SCALE
    held = images(9)[7:8]
    assert far(model, healed, held) < far(model, before, held)


def test_mimic_with_a_nan_loss_returns_to_a_good_state(
    model: nn.Module, cut: nn.Module, states: list[TrainingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureDistance, "mean", lambda *_: float("nan"))
    began = fxprune.heal(cut, model, images(9), "affine")
    healed = fxprune.heal(cut, model, images(9), steps=1)
    assert (states[-1].lr_scale, states[-1].warming_up) == (INITIAL_LR_SCALE / 2, False)
    assert equal(healed, began)
    assert all(bool(value.isfinite().all()) for value in healed.state_dict().values())


def test_learning_rate_grows_until_it_first_harms() -> None:
    layer = nn.Linear(2, 2)
    now = TrainingState(1.0, 0, 1 / 16, True, copy_state(layer))
    paces = []
    for astray in (False, False, True, False, True, False):
        now = now.advance(2.0, layer, astray)
        paces.append(now.lr_scale)
    assert paces == [1 / 8, 1 / 4, 1 / 8, 1 / 8, 1 / 16, 1 / 16]
    assert now.checks_without_gain == 6


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (7, [7]), (8, [4, 4]), (14, [5, 4, 5]), (16, [4, 4, 4, 4])])
def test_split_batch_makes_small_steps_and_uses_all_images(
    count: int, sizes: list[int], model: nn.Module, cut: nn.Module
) -> None:
    pair, _ = pair_of(model, cut, images(1))
    whole = pixels(count, 3, 4, 4)
    for form in (whole, list(whole)):
        parts = split_batch(Batch(form, None, count), pair.select)
        assert [part.count for part in parts] == [len(part.images) for part in parts] == sizes
        assert torch.equal(torch.cat([torch.stack([*part.images]) for part in parts]), whole)
    tokens = Batch({"x": whole}, None, count)
    assert split_batch(tokens, pair.select) == [tokens]


def test_muon_moves_matrices_along_orthogonal_directions() -> None:
    weights = [nn.Parameter(pixels(*shape)) for shape in ((200, 8, 3, 3), (4, 1, 3, 3), (5,))]
    weights[0].data = weights[0].data.contiguous(memory_format=torch.channels_last)
    before = [weight.detach().clone() for weight in weights]
    optimizers = MuonAdamW(weights)
    for weight in weights:
        weight.grad = pixels(*weight.shape, seed=1) - 0.5
    optimizers.step(1e-2)
    moved = [(weight - old).detach() for weight, old in zip(weights, before, strict=True)]
    for block in torch.split(moved[0].flatten(1), BLOCK_ROWS):
        sizes = torch.linalg.svdvals(block) / (1e-2 * 0.2 * max(block.shape) ** 0.5)
        assert 0.4 < float(sizes.min()) <= float(sizes.max()) < 1.3
    for part in moved[1:]:
        torch.testing.assert_close(part.abs(), torch.full_like(part, 1e-2), rtol=1e-3, atol=0.0)
    assert all(torch.equal(weight.sign(), (-pixels(*weight.shape, seed=1) + 0.5).sign()) for weight in moved[1:])


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 64), (64, 64)])
def test_muon_equals_torch_muon_up_to_rounding(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(pixels(*shape)) for _ in range(2))
    other = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    own = MuonAdamW([ours])
    for seed in range(3):
        ours.grad = theirs.grad = pixels(*shape, seed=seed) - 0.5
        before = ours.detach().clone()
        own.step(1e-2)
        other.step()  # type: ignore[no-untyped-call]
        move, wanted = ours.detach() - before, theirs.detach() - before
        assert (move - wanted).norm() < 0.1 * wanted.norm()


def test_newton_schulz_equals_the_iteration_in_float64() -> None:
    """Squares are iterated on: what comes out is what iterating on the matrix itself in float64 gives."""
    for shape in ((5, 70), (70, 5), (32, 32)):
        matrix = pixels(*shape) - 0.5
        wanted = matrix.double() / matrix.double().norm()
        for _ in range(NEWTON_SCHULZ_ITERATIONS):
            square = wanted @ wanted.T
            wanted = (
                NEWTON_SCHULZ_COEFFICIENTS[0] * wanted
                + (NEWTON_SCHULZ_COEFFICIENTS[1] * square + NEWTON_SCHULZ_COEFFICIENTS[2] * square @ square) @ wanted
            )
        assert (newton_schulz(matrix) - wanted).norm() < 1e-4 * wanted.norm()
    assert torch.equal(newton_schulz(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_muon_treats_a_missing_gradient_as_zero() -> None:
    ours, zeros = (nn.Parameter(pixels(4, 20)) for _ in range(2))
    for weight, gradient in ((ours, None), (zeros, torch.zeros(4, 20))):
        optimizers = MuonAdamW([weight])
        weight.grad = pixels(4, 20, seed=1) - 0.5
        optimizers.step(1e-2)
        weight.grad = gradient
        optimizers.step(1e-2)
    assert torch.equal(ours, zeros)
    assert not torch.equal(ours, pixels(4, 20))


@pytest.mark.parametrize("method", ["affine", "mimic"])
def test_mimic_names_the_batch_that_breaks_the_loss(method: str, model: nn.Module, cut: nn.Module) -> None:
    *batches, last = images(4, 8)  # in pieces of four, of which the eighth is held out
    with pytest.raises(LossError, match=r"batch 3: .*nan"):
        fxprune.heal(cut, model, [*batches, last + 9], method, loss=lambda net, x: (5 - x.max()).log() * net(x).sum())


# Models that were pruned before -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["affine", "mimic"])
def test_mimic_of_a_twice_pruned_model_targets_the_first_pruning(method: str) -> None:
    once = fxprune.compile(tiny(), labelled(), 0.2, heal="none")
    twice = fxprune.compile(once, labelled(), 0.2, heal="none", criterion="l1")
    healed = fxprune.heal(twice, once, images(9), method, steps=4)
    heals = [plan.settings.get("heal", {}).get("method") for plan in fxprune.report(healed).plans]
    assert heals == [None, method]
    assert far(once, healed, images(9)) < far(once, twice, images(9))
    with assert_refused(once, ModelError, "as many plans as .*the pruned model"):
        fxprune.heal(once, twice, images(), method)


# Seeds and checkpoints -----------------------------------------------------------------------------------------------


def test_mimic_depends_on_the_seed_alone(model: nn.Module, cut: nn.Module) -> None:
    one, again, other = (fxprune.heal(cut, model, images(9), seed=seed, **LONG) for seed in (0, 0, 1))
    assert equal(one, again)
    assert not equal(one, other)


def test_mimic_refuses_the_removed_checkpoint_argument(model: nn.Module, cut: nn.Module) -> None:
    removed: dict[str, Any] = {"checkpoint": "healing.pt"}
    with pytest.raises(SettingError, match="checkpoint= is gone"):
        fxprune.heal(cut, model, images(), **removed)
