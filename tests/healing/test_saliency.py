"""Saliency maps, and that fits and feature distances use them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.adapters.registry import choose_adapter
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.reconstruction import least_squares
from fxprune.healing.reconstruction.least_squares import RELATIVE_RIDGE, LayerRows, fit_layer
from fxprune.healing.saliency import MIN_WEIGHT, Maps, flip_maps, saliency_maps
from fxprune.healing.teacher_student import TeacherStudent, pair_models
from fxprune.runtime.private_copy import private_copy
from tests.helpers.models import build, labelled, pixels, tiny

HALF = 4


class Map(nn.Module):
    """Gives a map of a score a place, from two branches in turn, the first of which overwrites what its layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.last(x + self.middle(x))


def left(model: nn.Module, batch: Any) -> Tensor:
    """A loss of the left half alone; that of the second image is a hundred times the first's."""
    return (model(batch)[..., :HALF].square() * torch.tensor([1.0, 100.0]).reshape(2, 1, 1, 1)).mean()


def paired(loss: Any = left, model: nn.Module | None = None) -> tuple[TeacherStudent, Any]:
    model = model or build(Map)
    images = pixels(2, 3, 8, 8)
    adapter = choose_adapter(model, images, loss)
    batch = adapter.normalize(model, images)
    pruned = fxprune.compile(
        model, [images], 0.01, heal="none", loss=loss, criterion=lambda region, _: float(region.name != "middle")
    )
    return pair_models(private_copy(model), private_copy(pruned), adapter, batch, [""]), batch


def test_saliency_maps_weigh_ignored_places_least_and_images_equally() -> None:
    pair, batch = paired()
    maps = saliency_maps(pair, batch)
    assert set(maps) == {(name, 1) for name in ("", "first", "middle", "last")}
    given: Any = maps["last", 1][0]
    assert given.shape == (2, 8, 8)
    assert bool((given[..., HALF:] == torch.tensor(MIN_WEIGHT).bfloat16()).all())
    assert bool((given[..., :HALF] > 1.1 * MIN_WEIGHT).any())
    torch.testing.assert_close(given.float().mean((1, 2)), torch.ones(2), rtol=1e-2, atol=0)
    scores = pair.teacher(batch.images).abs()[:, 0, :, :HALF]
    expected = MIN_WEIGHT + (1 - MIN_WEIGHT) * 2 * scores / scores.mean(
        (1, 2), keepdim=True
    )  # the gradient is twice the score
    torch.testing.assert_close(given[..., :HALF].float(), expected.detach(), rtol=1e-2, atol=1e-3)
    first: Any = maps["first", 1][0]
    assert bool((first[..., HALF + 1 :] == torch.tensor(MIN_WEIGHT).bfloat16()).all())  # but for what a kernel reaches


class Named(Map):
    """Gives its map beside what is no features."""

    def forward(self, x: Tensor) -> Any:
        return {"count": torch.tensor(len(x)), "map": super().forward(x)}


def test_saliency_maps_of_outputs_are_numbered_by_feature() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return left(lambda images: model(images)["map"], batch)  # type: ignore[arg-type]

    pair, batch = paired(loss, build(Named))
    found = saliency_maps(pair, batch)["", 1]
    assert len(found) == 1
    assert found[0] is not None
    assert found[0].device.type == "cpu"


def test_saliency_maps_change_neither_model_nor_randomness() -> None:
    pair, batch = paired()
    pair.teacher.requires_grad_(False)
    pair.teacher.get_parameter("last.weight").requires_grad_(True)
    before = [value.clone() for value in pair.teacher.state_dict().values()]
    saliency_maps(pair, batch)
    takes = {name for name, weight in pair.teacher.named_parameters() if weight.requires_grad}
    assert takes == {"last.weight"}
    assert all(weight.grad is None for weight in pair.teacher.parameters())
    after = pair.teacher.state_dict().values()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not any(module._forward_hooks for module in pair.teacher.modules())


def test_saliency_maps_without_a_gradient_are_empty() -> None:
    pair, batch = paired()
    adapter = choose_adapter(pair.teacher, batch.images, lambda model, images: model(images).detach().mean())
    assert saliency_maps(pair, batch)
    assert not saliency_maps(replace(pair, adapter=adapter), batch)


def test_saliency_maps_of_a_nan_gradient_are_empty() -> None:
    pair, batch = paired()
    adapter = choose_adapter(pair.teacher, batch.images, lambda model, images: (model(images) * 0).sqrt().mean())
    assert not saliency_maps(replace(pair, adapter=adapter), batch)


def test_saliency_maps_leave_out_vectors() -> None:
    model = tiny()
    batch = labelled()[0]
    adapter = choose_adapter(model, batch, None)
    pruned = fxprune.apply(model, fxprune.analyze(model, labelled()).plan(0.2))
    normal = adapter.normalize(model, batch)
    pair = pair_models(private_copy(model), private_copy(pruned), adapter, normal, [""])
    found = saliency_maps(pair, normal)
    assert ("stem", 1) in found
    assert not {"fc", ""} & {name for name, _ in found}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["weights", "rows"])
@torch.no_grad()
def test_fit_layer_solves_weighted_least_squares(bias: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "_match_moments", lambda *_: torch.zeros(()))
    monkeypatch.setattr(least_squares, "MAX_PRIMAL_INPUTS", 5000 if kind == "weights" else 1)
    layer: Any = build(partial(nn.Conv2d, 3, 2, 1, bias=bias))
    x, y = pixels(4, 3, 6, 6, seed=1) + 3, pixels(4, 2, 6, 6, seed=2)
    weights = pixels(4, 6, 6, seed=3) ** 4
    rows = x.movedim(1, -1).reshape(-1, 3).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1) if bias else rows
    start = layer.weight.flatten(1).T.double()
    start = torch.cat([start, layer.bias[None].double()]) if bias else start
    each = weights.reshape(-1, 1).double()
    gram = rows.T @ (each * rows)
    weighed = gram.diagonal() if kind == "rows" else gram.diagonal()[:3]
    ridge = RELATIVE_RIDGE * weighed.sum() / 3 * torch.eye(len(gram), dtype=torch.float64)
    want = y.movedim(1, -1).reshape(-1, 2).double()
    expected = torch.linalg.solve(gram + ridge, rows.T @ (each * want) + ridge @ start)
    fit_layer(layer, LayerRows([x[:1], x[1:]], [y[:1], y[1:]], saliency=[weights[:1], weights[1:]]))
    torch.testing.assert_close(layer.weight.flatten(1).T.double(), expected[:3], rtol=1e-3, atol=1e-3)
    if bias:
        torch.testing.assert_close(layer.bias.double(), expected[3], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_fit_layer_of_a_norm_uses_salient_mean_and_spread() -> None:
    norm = nn.BatchNorm2d(3).eval()
    x = pixels(4, 3, 8, 8)
    wanted = torch.cat([2 * x[..., :HALF] + 1, 7 * x[..., HALF:] - 5], -1)
    weights = torch.cat([torch.ones(4, 8, HALF), torch.zeros(4, 8, HALF)], -1)
    fit_layer(norm, LayerRows([x], [wanted], saliency=[weights]))
    torch.testing.assert_close(norm(x)[..., :HALF], wanted[..., :HALF], rtol=1e-4, atol=1e-4)


def halves(pair: TeacherStudent, batch: Any, weigh: tuple[float, float]) -> Maps:
    """Maps that give the halves of the last layer's map these weights."""
    columns = torch.tensor([weigh[0]] * HALF + [weigh[1]] * HALF)
    return {("", 1): [columns.expand(batch.count, 8, 8)]}


@torch.no_grad()
def test_feature_distance_weighs_salient_places_and_mirrors_them() -> None:
    pair, batch = paired()
    distance = FeatureDistance(pair, [batch])
    assert distance.points == [""]
    off = (pair.student(batch.images) - pair.teacher(batch.images)).square()
    variance = pair.teacher(batch.images).var(correction=0)

    def expected(part: Tensor) -> Tensor:
        return torch.log1p(part.sum() / off.numel() / variance).double()

    torch.testing.assert_close(distance(batch), expected(off), rtol=1e-4, atol=0)
    one, other = halves(pair, batch, (1.0, 0.0)), halves(pair, batch, (0.0, 1.0))
    torch.testing.assert_close(distance(batch, one), expected(off[..., :HALF]), rtol=1e-4, atol=0)
    torch.testing.assert_close(distance(batch, other), expected(off[..., HALF:]), rtol=1e-4, atol=0)
    both, second = torch.tensor([True, True]), torch.tensor([False, True])
    flipped = replace(batch, images=batch.images.flip(-1))
    mixed = replace(batch, images=torch.cat([batch.images[:1], flipped.images[1:]]))
    left = torch.tensor([1.0] * HALF + [0.0] * HALF)
    maps: Maps = {("", 1): [torch.stack([left, left.flip(0)])[:, None].expand(2, 8, 8)]}
    torch.testing.assert_close(distance(batch, one, both), distance(flipped, other))
    torch.testing.assert_close(distance(batch, one, second), distance(mixed, maps))
    assert not torch.allclose(distance(batch, one, both), distance(batch, one))
    assert distance.mean([batch], [one]) == pytest.approx(float(expected(off[..., :HALF])), rel=1e-4)


def test_flip_maps_without_columns_gives_ones() -> None:
    weights = pixels(2, 5)
    found = flip_maps(weights, torch.tensor([False, True]))
    assert torch.equal(found[0], weights[0])
    assert bool((found[1] == 1).all())


def test_affine_fits_better_where_the_loss_is_sensitive() -> None:
    """The left half, which the loss is of, comes out nearer to what it was than where all places count alike."""
    model: Any = build(Map)
    images = [pixels(4, 3, 8, 8, seed=seed) ** 3 for seed in range(4)]
    for batch in images:
        batch[..., HALF:] = 1 - batch[..., HALF:]  # the halves differ, and no fit can do right by both
    plan = fxprune.analyze(model, images, loss=squares, criterion=lambda region, _: float(region.name != "middle"))
    pruned = fxprune.apply(model, plan.plan(0.01))
    with torch.no_grad():
        far = {}
        for loss in (squares, left_of_all):
            healed = fxprune.heal(pruned, model, images, "affine", loss=loss)
            parts = [(healed(batch) - model(batch))[..., :HALF].square().mean() for batch in images]
            far[loss] = float(torch.stack(parts).mean())
    assert far[left_of_all] < far[squares]


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def left_of_all(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)[..., :HALF].square().mean()
