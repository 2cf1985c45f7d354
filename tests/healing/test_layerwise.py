"""Fits of layers, among them layers that are called several times, as on every level of a pyramid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.healing.heal import heal_student
from fxprune.healing.methods import HealingContext
from fxprune.healing.reconstruction import least_squares
from fxprune.healing.reconstruction.least_squares import Fit, LayerRows, fit_layer
from tests.helpers.models import build, labelled, pixels

KINDS: dict[str, tuple[Callable[[], nn.Module], Fit]] = {
    "convolution": (partial(nn.Conv2d, 3, 4, 3, bias=False), fit_layer),
    "convolution with a bias": (partial(nn.Conv2d, 3, 4, 3, stride=2, padding=1), fit_layer),
    "groups": (partial(nn.Conv2d, 6, 6, 1, groups=3), fit_layer),
    "norm": (partial(nn.GroupNorm, 1, 3), fit_layer),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fitting_call_by_call_equals_fitting_all_at_once(kind: str) -> None:
    make, fit = KINDS[kind]
    layer, whole = build(make).eval(), build(make).eval()
    channels = 6 if kind == "groups" else 3
    levels = [pixels(4, channels, size, size, seed=size) for size in (12, 6, 4)]
    wanted = [2 * layer(level) + 0.3 * layer(level.flip(0)) + 1 for level in levels]
    sums: dict[str, Tensor] = {}
    before = [value.clone() for value in layer.state_dict().values()]
    for number, (x, y) in enumerate(zip(levels, wanted, strict=True)):
        changed = number > 0  # the first level gives what it gave, and is to go on so
        fit(layer, LayerRows([x[:2], x[2:]], [y[:2], y[2:]], changed, sums))
        alike = [torch.equal(old, new) for old, new in zip(before, layer.state_dict().values(), strict=True)]
        assert all(alike) == (not changed)
    fit(whole, LayerRows(levels, wanted))
    for found, value in zip(layer.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [partial(nn.Conv2d, 6, 4, 3, groups=2, bias=False), partial(nn.Linear, 9, 4)])
@torch.no_grad()
def test_fit_layer_dual_form_equals_primal_form(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, wide = build(make).eval(), build(make).eval()
    x = pixels(8, 6, 7, 9, seed=1) + 5
    wanted = layer(x.flip(0)) + 3 * layer(x)
    monkeypatch.setattr(least_squares, "_match_moments", lambda *_: None)
    fit_layer(layer, LayerRows([x], [wanted]))
    monkeypatch.setattr(least_squares, "MAX_PRIMAL_INPUTS", 1)
    sums: dict[str, Tensor] = {}
    for part in (slice(0, 3), slice(3, 8)):
        fit_layer(wide, LayerRows([x[part]], [wanted[part]], sums=sums))
    for found, value in zip(wide.state_dict().values(), layer.state_dict().values(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_fits_of_wide_groups_do_not_depend_on_threads() -> None:
    """What torch's LU of a batch is not: it gave NaN for matrices of more than about 150 rows."""
    found, threads = [], torch.get_num_threads()
    x = pixels(8, 64, 9, 9, seed=1)
    for number in (1, 2):
        layer = build(partial(nn.Conv2d, 64, 8, 3, groups=2)).eval()
        try:
            torch.set_num_threads(number)
            fit_layer(layer, LayerRows([x], [layer(x.flip(0))]))
        finally:
            torch.set_num_threads(threads)
        found.append(layer.weight)
    torch.testing.assert_close(*found)


class Pyramid(nn.Module):
    """Two levels and one head; a layer that can go changes the second level, or the first one."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(6, 6, 1)
        self.head = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        second = self.down(first)
        if self.second:
            second = self.middle(second)
        else:
            first = self.middle(first)
        return torch.cat([self.head(level).mean((2, 3)) for level in (first, second)], 1)


@pytest.mark.parametrize("second", [False, True])
def test_shared_head_is_fitted_to_all_levels(second: bool) -> None:
    model: Any = build(partial(Pyramid, second))
    pruned: Any = fxprune.compile(
        model, labelled(), 0.01, heal="none", criterion=lambda region, _: float(region.name != "middle")
    )
    assert [region.name for region in fxprune.report(pruned).removed] == ["middle"]
    healed: Any = heal_student(
        pruned, model, [pixels(8, 3, 16, 16, seed=seed) for seed in range(3)], "affine", None, HealingContext()
    )
    x = pixels(8, 3, 16, 16, seed=7)
    with torch.no_grad():
        before, after = ((found(x) - model(x)).square().reshape(8, 2, 4).mean((0, 2)) for found in (pruned, healed))
    assert after[int(second)] < before[int(second)] / 4
    assert after.sum() < before.sum() / 4
    for name in ("head.0", "head.1", "head.3"):
        assert not torch.equal(healed.get_submodule(name).weight, pruned.get_submodule(name).weight)


class Standardized(nn.Conv2d):
    """Its weights are not what it applies."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), weight, bias)


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    "make",
    [
        partial(Standardized, 3, 4, 3),
        partial(Padded, 3, 4, 3),
        partial(Activated, 3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    ],
    ids=["standardized", "padded", "activated", "parametrized"],
)
@torch.no_grad()
def test_subclassed_layers_are_not_fitted(make: Callable[[], nn.Module]) -> None:
    layer, x = build(make).eval(), pixels(4, 3, 8, 8)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    fit_layer(layer, LayerRows([x], [2 * layer(x) + 1]))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(6), (4, 8, 8, 6)),
        (nn.LayerNorm(6), (4, 9, 6)),
        (nn.GroupNorm(2, 6), (4, 6, 8, 8)),
        (nn.BatchNorm1d(6), (40, 6)),
        (nn.BatchNorm1d(6), (4, 6, 9)),
    ],
    ids=str,
)
@torch.no_grad()
def test_norms_are_fitted_along_their_channel_dimension(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = build(lambda: layer), pixels(*shape)
    second = 1 if shape[1] == 6 and not isinstance(layer, nn.LayerNorm) else -1
    scale = torch.arange(1.0, 7.0).reshape([-1 if axis == second % len(shape) else 1 for axis in range(len(shape))])
    wanted = scale * layer(x) - scale
    fit_layer(layer, LayerRows([x], [wanted]))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
