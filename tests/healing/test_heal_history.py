"""The note that `heal` writes to the plan of the healed model, and its warnings."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fxprune
from fxprune.errors import FxpruneWarning, SettingError, StorageError
from fxprune.healing import heal
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.loss_change import LossChange
from fxprune.planning.analysis import Analysis
from fxprune.rewriting.history import structural_changes
from fxprune.runtime.private_copy import private_copy
from tests.helpers.healing import Chain, images, pair_of, without
from tests.helpers.hostile import Unread
from tests.helpers.models import build, labelled, tiny


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def cut(model: nn.Module, analysis: Analysis) -> nn.Module:
    return fxprune.apply(model, without(analysis, "blocks.0", "blocks.2"))


@pytest.mark.parametrize("method", ["affine", "mimic"])
def test_heal_notes_method_images_and_loss(method: str, model: nn.Module, cut: nn.Module) -> None:
    healed = fxprune.heal(cut, model, images(9), method, steps=5)
    note: Any = fxprune.report(healed).settings["heal"]
    assert (note["method"], note["images"], note.get("steps")) == (method, 36, 5 if method == "mimic" else None)
    for when, network in ("before", cut), ("after", healed):
        pair, read = pair_of(model, network, images(9))
        assert note["distance"][when] == pytest.approx(
            FeatureDistance(pair, read[:7] + read[8:]).mean(read[7:8]), rel=1e-4
        )
    assert isinstance(note["seconds"], float)
    assert "heal" not in fxprune.report(cut).settings
    assert 0 <= note["loss"]["after"] < note["loss"]["before"]


@pytest.mark.filterwarnings("ignore:the classifier gives all 36 images the same class:fxprune.FxpruneWarning")
def test_heal_warns_of_a_loss_that_stays_far_off(
    model: nn.Module, cut: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = fxprune.report(fxprune.heal(cut, model, images(9), "affine")).settings["heal"]
    left = found["loss"]["after"]
    monkeypatch.setattr(heal, "WARN_LOSS_DEVIATION", left)
    advice = "heal='mimic' or strategy='search';"
    with pytest.warns(FxpruneWarning, match=rf"off by {left:.2g} .*{advice}") as caught:
        fxprune.heal(cut, model, images(9), "affine")
    assert caught[0].filename == __file__
    monkeypatch.setattr(heal, "WARN_LOSS_DEVIATION", 0.0)
    with pytest.warns(FxpruneWarning, match=r"off by .* heal='mimic';"):
        fxprune.compile(model, images(9), 0.3, strategy="search", tries=1)
    monkeypatch.setattr(heal, "WARN_LOSS_DEVIATION", 1.001 * left)
    fxprune.heal(cut, model, images(9), "affine")


def test_heal_warns_of_a_nan_loss(model: nn.Module, cut: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossChange, "deviation", lambda self, pruned: math.inf)
    with pytest.warns(FxpruneWarning, match=r"no number: .*more steps or strategy='search';"):
        healed = fxprune.heal(cut, model, images(9), "mimic", steps=2)
    assert fxprune.report(healed).settings["heal"]["loss"] == {"before": None, "after": None}


def test_heal_note_survives_copies_and_saves(model: nn.Module, cut: nn.Module, tmp_path: Path) -> None:
    healed = fxprune.heal(cut, model, images(), "affine")
    report = fxprune.report(healed)
    assert fxprune.report(copy.deepcopy(copy.deepcopy(healed))) == report
    fxprune.save(healed, tmp_path / "healed")
    loaded = fxprune.load(tiny(), tmp_path / "healed")
    assert fxprune.report(loaded) == report
    fxprune.save(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "plan.json").read_text())["settings"]["heal"] == report.settings["heal"]


def test_applied_plan_of_a_healed_model_has_no_heal_note(model: nn.Module, cut: nn.Module) -> None:
    (plan,) = fxprune.report(fxprune.heal(cut, model, images(), "affine")).plans
    assert "heal" in plan.settings
    assert "heal" not in fxprune.report(fxprune.apply(model, plan)).settings


def test_structural_changes_after_pruning_are_still_seen_after_heal(
    model: nn.Module, cut: nn.Module, tmp_path: Path
) -> None:
    changed = private_copy(cut)
    changed.add_module("more", nn.Linear(2, 2))
    before = structural_changes(changed)
    assert before
    healed = fxprune.heal(changed, model, images(), "affine")
    assert structural_changes(healed) == before
    with pytest.raises(StorageError, match="was changed after pruning"):
        fxprune.save(healed, tmp_path / "healed")


def test_model_without_healing_has_no_heal_note(model: nn.Module, cut: nn.Module) -> None:
    assert fxprune.report(fxprune.heal(cut, model, images(), "none")) == fxprune.report(cut)


def test_heal_of_a_model_without_norms_compares_outputs() -> None:
    model: Any = build(Chain)
    pruned = fxprune.compile(model, labelled(), 0.01, criterion=lambda region, _: float(region.name != "middle"))
    healed = fxprune.heal(pruned, model, images(9), "mimic", steps=3)
    note: Any = fxprune.report(healed).settings["heal"]
    assert 0 < note["distance"]["after"] < note["distance"]["before"]


def test_compile_passes_steps_to_heal() -> None:
    pruned = fxprune.compile(tiny(), labelled(), 0.3, heal="mimic", steps=2)
    assert fxprune.report(pruned).settings["heal"]["steps"] == 2
    with pytest.raises(SettingError, match="steps is 0"):
        fxprune.compile(tiny(), Unread(), 0.3, heal="mimic", steps=0)
