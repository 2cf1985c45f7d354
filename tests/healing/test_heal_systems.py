"""Healing of the six systems, from images without labels: outputs get closer to the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune.adapters.registry import unwrap
from fxprune.healing import methods
from tests.helpers.cases import Case
from tests.helpers.hostile import assert_unchanged

pytestmark = pytest.mark.slow


def mirrored(images: Any) -> Any:
    return images.flip(-1) if isinstance(images, Tensor) else [image.flip(-1) for image in images]


def unlabelled(case: Case) -> list[Any]:
    """Two batches of the case's images, four times over: of random weights nothing is learnt that holds for others."""
    ways = (case.x, mirrored(case.x))
    return [{"img": images} for images in ways] * 4 if isinstance(case.batch, dict) else [*ways] * 4


@pytest.mark.filterwarnings("ignore:after healing:fxprune.FxpruneWarning")  # weights are random
@pytest.mark.parametrize("method", ["affine", "mimic"])
def test_heal_brings_a_system_nearer_to_the_original(case: Case, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "INTERPOLATIONS", (1.0,))  # the loss of random weights does not show how far to go
    with assert_unchanged(case.model), assert_unchanged(case.pruned):
        healed = fxprune.heal(case.pruned, case.model, unlabelled(case), method, steps=4)
    report = fxprune.report(healed)
    distance: Any = report.settings["heal"]["distance"]
    assert distance["after"] < 0.6 * distance["before"]

    state, before = unwrap(healed).state_dict(), unwrap(case.pruned).state_dict()
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    assert any(not torch.equal(state[key], before[key]) for key in state)
    assert (report.after, report.removed) == (fxprune.report(case.pruned).after, fxprune.report(case.pruned).removed)
    assert type(healed).__name__ == type(case.pruned).__name__
    assert not unwrap(healed).training
    with torch.no_grad():
        copy.deepcopy(healed)(case.x)
