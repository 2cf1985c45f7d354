"""Losses under autocast, and models and batches in half precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.adapters.custom_loss import normalize
from fxprune.healing.reconstruction import layerwise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(6, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Blocks(nn.Module):
    """Residual blocks, one graph or, if `eager`, one graph per block."""

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager, self.stem, self.head = eager, nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 4, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.eager and not bool(x.isfinite().all()):
                raise ValueError("not finite")
            x = block(x)
        return self.head(x)


def batches() -> list[Tensor]:
    return [torch.rand(4, 3, 16, 12) for _ in range(3)]


def full_loss(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().square().mean()


def autocast_loss(model: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return full_loss(model, images)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("criterion", ["fisher", "fisher_mended", "grad_delta"])
def test_scores_under_autocast_are_near_those_in_float32(eager: bool, criterion: str) -> None:
    model, data = Blocks(eager).eval(), batches()
    found, expected = (
        {region.name: region.score for region in fxprune.analyze(model, data, loss=loss, criterion=criterion).regions}
        for loss in (autocast_loss, full_loss)
    )
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=0.1) for name in expected)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("method", ["affine", "mimic"])
def test_model_is_healed_under_autocast(eager: bool, method: str) -> None:
    model, data = Blocks(eager).eval(), batches()
    pruned = fxprune.compile(model, data, budget=0.2, loss=autocast_loss, heal=method, steps=4)
    note = fxprune.report(pruned).settings["heal"]
    assert note["distance"]["after"] < note["distance"]["before"]
    assert all(weight.dtype == torch.float32 for weight in pruned.parameters())


def test_layers_are_fitted_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, seen = Blocks(False).eval(), batches(), set[torch.dtype]()
    deviation = layerwise._deviation

    def watch(outputs: Any, targets: Any) -> float:
        seen.update(value.dtype for value in (*outputs, *targets))
        return deviation(outputs, targets)

    monkeypatch.setattr(layerwise, "_deviation", watch)
    fxprune.compile(model, data, budget=0.2, loss=autocast_loss, heal="affine")
    assert seen == {torch.float32}


def test_autocast_around_the_call_changes_nothing() -> None:
    model, data = Blocks(False).eval(), batches()
    expected = fxprune.compile(model, data, budget=0.2, loss=full_loss, heal="affine")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruned = fxprune.compile(model, data, budget=0.2, loss=full_loss, heal="affine")
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["none", "affine", "mimic"])
def test_model_in_half_precision_is_pruned_on_its_own_batches(dtype: torch.dtype, method: str) -> None:
    model, data = Blocks(False).eval().to(dtype), [images.to(dtype) for images in batches()]
    pruned = fxprune.compile(model, data, budget=0.2, loss=full_loss, heal=method, steps=2)
    assert {value.dtype for value in (*pruned.parameters(), *pruned.buffers()) if value.is_floating_point()} == {dtype}
    assert pruned.to(torch.bfloat16)(data[0].bfloat16()).shape == (4, 4, 8, 6)


def test_batch_of_a_callers_loss_keeps_all_types_but_half_precision() -> None:
    raw = {
        "pixels": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "half": torch.zeros(2).half(),
        "double": torch.zeros(2).double(),
    }
    images = normalize(nn.Linear(2, 2), copy.deepcopy(raw)).images
    assert {name: value.dtype for name, value in images.items()} == {
        "pixels": torch.uint8, "half": torch.float32, "double": torch.float64,
    }  # fmt: skip
