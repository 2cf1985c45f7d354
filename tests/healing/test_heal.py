"""`fxprune.heal`: the healed model, what it leaves unchanged, and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import BatchError, ModelError, PlanError, SettingError
from fxprune.healing import methods
from fxprune.healing.distillation.schedule import copy_state
from fxprune.healing.heal import heal_student
from fxprune.healing.loss_change import LossChange
from fxprune.healing.methods import INTERPOLATIONS, METHODS, HealingContext
from fxprune.healing.reconstruction.layerwise import reconstruct_layers
from fxprune.healing.reconstruction.least_squares import RELATIVE_RIDGE, LayerRows, fit_layer
from fxprune.healing.teacher_student import TeacherStudent
from fxprune.planning.analysis import Analysis
from fxprune.runtime.private_copy import private_copy
from tests.helpers.healing import Chain, equal, far, images, tiny_with_statistics, without
from tests.helpers.hostile import Unread, assert_refused, assert_unchanged
from tests.helpers.models import Eager, build, labelled, pixels, squared, tiny


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_with_statistics()


@pytest.fixture(scope="module")
def cut(model: nn.Module, analysis: Analysis) -> nn.Module:
    return fxprune.apply(model, without(analysis, "blocks.0", "blocks.2"))


def middle_gone(model: nn.Module) -> nn.Module:
    """A model without its layer of that name, and nothing healed."""
    return fxprune.compile(
        model, labelled(), 0.01, heal="none", criterion=lambda region, _: float(region.name != "middle")
    )


# What each method gives ----------------------------------------------------------------------------------------------


def test_affine_equals_least_squares_with_the_original_spread() -> None:
    model: Any = build(Chain)
    pruned: Any = middle_gone(model)
    healed: Any = heal_student(pruned, model, images(), "affine", None, HealingContext()).double()
    with torch.no_grad():
        x = torch.cat(images())
        now = model.first(x).double()
        rows = functional.unfold(now, 3, dilation=2, padding=1, stride=2).transpose(1, 2).reshape(-1, 54)
        want = model.last(model.middle(model.first(x))).double().permute(0, 2, 3, 1).reshape(-1, 5)
    bare = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
    start = torch.cat([model.last.weight.detach().flatten(1), model.last.bias.detach()[:, None]], 1).double()
    held = RELATIVE_RIDGE * rows.square().sum(0).mean()
    least = torch.linalg.solve(
        bare.T @ bare + held * torch.eye(55, dtype=torch.float64), bare.T @ want + held * start.T
    )
    given = bare @ least
    slope = want.std(0) / given.std(0)
    torch.testing.assert_close(healed.last.weight.flatten(1), (slope * least[:-1]).T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        healed.last.bias, slope * (least[-1] - given.mean(0)) + want.mean(0), rtol=1e-3, atol=1e-4
    )
    before, after = (functional.mse_loss(version(x), model(x)) for version in (pruned, healed.float()))
    assert after < before / 100  # a linear map went, and the next layer can take it in


@pytest.mark.parametrize("kind", [partial(nn.BatchNorm2d, 3), partial(nn.Conv2d, 3, 3, 1)], ids=["norm", "conv"])
def test_affine_keeps_the_spread_of_partly_explained_outputs(kind: Callable[[], nn.Module]) -> None:
    layer = build(kind)
    x, noise = pixels(8, 3, 32, 32, seed=0) - 0.5, pixels(8, 3, 32, 32, seed=1) - 0.5
    told = torch.tensor([1.0, 0.5, 0.0]).reshape(3, 1, 1)
    wanted = 4 * (told * x + (1 - told) * noise) + 7
    with torch.no_grad():
        fit_layer(layer, LayerRows([x[:4], x[4:]], [wanted[:4], wanted[4:]]))
        given = layer(x)
    torch.testing.assert_close(given.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    spread, was = given.std((0, 2, 3)), wanted.std((0, 2, 3))
    torch.testing.assert_close(spread[:2], was[:2], rtol=2e-2, atol=0)
    assert spread[2] < 0.5 * was[2]  # chance alone is not blown up


@pytest.mark.parametrize("best", INTERPOLATIONS)
def test_affine_interpolation_is_chosen_by_the_loss_on_held_out_images(
    best: float, model: nn.Module, cut: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, Tensor]] = []
    judged: list[Tensor] = []
    fitted: list[Tensor] = []

    def astray(self: LossChange, pruned: nn.Module) -> float:
        tried.append(copy_state(pruned))
        judged.extend(batch.images for _, batch in self.batches)
        return abs(INTERPOLATIONS[len(tried) - 1] - best)

    def fit(pair: TeacherStudent, batches: Any, *rest: Any) -> list[str]:
        fitted.extend(batch.images for batch in batches)
        return reconstruct_layers(pair, batches, *rest)

    monkeypatch.setattr(LossChange, "deviation", astray)
    monkeypatch.setattr(methods, "reconstruct_layers", fit)
    found = fxprune.heal(cut, model, images(), "affine")
    assert fxprune.report(found).settings["heal"]["share"] == best
    healed = found.state_dict()
    assert len(tried) == len(INTERPOLATIONS)
    assert not any(torch.equal(one, other) for one in judged for other in fitted)
    start, end = cut.state_dict(), tried[0]
    for name, value in healed.items():
        whole = torch.lerp(start[name], end[name], best) if value.is_floating_point() else value
        torch.testing.assert_close(value, whole)
    assert any(not torch.equal(value, start[name]) for name, value in healed.items()) == (best > 0)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_affine_fits_grouped_convolutions_group_by_group(groups: int) -> None:
    model: Any = build(Chain)
    model.last = nn.Conv2d(6, 6, 3, groups=groups, padding="same", padding_mode="reflect", bias=False)
    pruned: Any = middle_gone(model)
    healed: Any = fxprune.heal(pruned, model, images(), "affine")
    with torch.no_grad():
        wide = [tuple(version.last(model.first(x)) for version in (pruned, healed)) for x in images()]
        want = [model.last(model.middle(model.first(x))) for x in images()]
    before, after = (sum(functional.mse_loss(got[i], y) for got, y in zip(wide, want, strict=True)) for i in (0, 1))
    assert after < before * (0.05 if groups == 1 else 0.9)


@pytest.mark.parametrize("method", ["affine", "mimic"])
def test_heal_brings_features_closer(method: str, model: nn.Module, cut: nn.Module) -> None:
    healed = fxprune.heal(cut, model, images(9), method, steps=30)
    assert far(model, healed, images(9)) < far(model, cut, images(9))


def test_heal_leaves_layers_before_a_removed_block_unchanged(model: nn.Module, analysis: Analysis) -> None:
    pruned = fxprune.apply(model, without(analysis, "blocks.2"))
    healed = fxprune.heal(pruned, model, images(), "affine")
    same = {key for key, value in pruned.state_dict().items() if torch.equal(value, healed.state_dict()[key])}
    early = {key for key in pruned.state_dict() if key.startswith(("stem.", "blocks.0.", "blocks.1."))}
    assert early <= same
    assert "blocks.3.norm.running_mean" in same
    assert "blocks.3.norm.weight" not in same


# What comes back, and what does not change ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_heal_changes_neither_model(method: str, model: nn.Module, cut: nn.Module) -> None:
    with assert_unchanged(model), assert_unchanged(cut):
        fxprune.heal(cut, model, labelled(), method, steps=2)


def test_heal_keeps_dtype_mode_and_plans(model: nn.Module, cut: nn.Module) -> None:
    half = private_copy(cut).half().train()
    healed = fxprune.heal(half, model, images(), "affine")
    assert {value.dtype for value in healed.parameters()} == {torch.float16}
    assert healed.training
    assert type(healed).__name__ == type(cut).__name__ == "Tiny"
    assert fxprune.report(healed).removed == fxprune.report(cut).removed


def test_healed_model_can_be_saved_and_loaded(model: nn.Module, cut: nn.Module, tmp_path: Path) -> None:
    healed = fxprune.heal(cut, model, images(), "affine")
    fxprune.save(healed, tmp_path / "healed")
    assert equal(fxprune.load(tiny(), tmp_path / "healed"), healed)


def test_heal_works_with_a_custom_loss() -> None:
    model = build(Eager)
    pruned = fxprune.compile(
        model, labelled(), heal="none", loss=squared, criterion=lambda region, _: float(region.name != "body.1")
    )
    healed = fxprune.heal(pruned, model, labelled(), "affine", loss=squared)
    x = pixels(4, 3, 16, 16)
    assert functional.mse_loss(healed(x), model(x)) < functional.mse_loss(pruned(x), model(x))


class Scaled(nn.LayerNorm):
    """A layer whose inside is traced: the pruned model's graph does not call it, the model as it was does."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.permute(0, 2, 3, 1)
        return functional.layer_norm(rows, self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


def test_heal_skips_layers_that_only_one_model_calls() -> None:
    model = build(Chain)
    model.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Scaled(6))
    pruned = middle_gone(model)
    healed = fxprune.heal(pruned, model, images(), "mimic", steps=2)
    x = torch.cat(images())
    assert functional.mse_loss(healed(x), model(x)) < functional.mse_loss(pruned(x), model(x)) / 10


# Bad input -----------------------------------------------------------------------------------------------------------


def test_heal_refuses_unknown_methods_before_reading_batches(model: nn.Module, cut: nn.Module) -> None:
    with assert_refused(cut, SettingError, "heal 'prayer' .*known: none, affine, mimic"):
        fxprune.heal(cut, model, Unread(), "prayer")


def test_heal_refuses_an_unpruned_model(model: nn.Module) -> None:
    with assert_refused(model, ModelError, "Tiny carries no fxprune plan"):
        fxprune.heal(model, model, images(), "affine")


def test_heal_refuses_another_model(cut: nn.Module) -> None:
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with assert_refused(cut, PlanError, "'<model>' .*has fingerprint"):
        fxprune.heal(cut, other, images(), "affine")


def test_heal_names_bad_batches(model: nn.Module, cut: nn.Module) -> None:
    with assert_refused(cut, BatchError, "batch 1: "):
        fxprune.heal(cut, model, [*images(1), "x"], "affine")


@pytest.mark.parametrize("setting", [{"steps": 0}, {"steps": 1.5}, {"learning_rate": 0.0}, {"learning_rate": "fast"}])
def test_heal_names_bad_settings(setting: dict[str, Any], model: nn.Module, cut: nn.Module) -> None:
    with assert_refused(cut, SettingError, next(iter(setting))):
        fxprune.heal(cut, model, images(), "mimic", **setting)
