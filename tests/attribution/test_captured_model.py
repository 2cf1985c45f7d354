"""Captured models keep their own modules; parts that no gradient can reach have no score by gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.registry import choose_adapter
from fxprune.attribution.captured_model import capture_model, find_all_regions
from fxprune.errors import NoRegionError
from tests.helpers.models import Block, build, finite, labelled, squared

GRADIENT_CRITERIA = ["fisher", "grad_delta", "grad_act", "fisher_mended"]


class Head(nn.Module):
    """Has more than a forward."""

    classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self._scale = nn.Sequential(Block(8), Block(8)), nn.Conv2d(8, 6, 1), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))

    def decode(self, y: Tensor) -> Tensor:
        return y.mean((2, 3))[:, : self.classes] * self._scale


class Decoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head.decode(self.head(self.stem(finite(x))))


class Stopped(nn.Module):
    """Lets no gradient reach its trunk."""

    def __init__(self, how: str, neck: bool = True) -> None:
        super().__init__()
        self.how = how
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8))
        self.neck, self.fc = Block(8) if neck else nn.Identity(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how != "no_grad"):
            x = self.trunk(finite(x))
        return self.fc(self.neck(x.detach()).mean((2, 3)))


def test_captured_model_keeps_its_modules() -> None:
    model, (raw, *_) = build(Decoding), labelled()
    adapted = AdaptedModel.copy_of(model, choose_adapter(model, raw, None))
    kinds = [type(module) for module in adapted.module.modules()]
    captured = capture_model(adapted, adapted.read(0, raw))
    assert captured.adapted is adapted
    assert [type(module) for module in adapted.module.modules()] == kinds
    assert [name for name, _ in captured.graphs] == ["stem", "head"]
    assert captured.graphs.model is adapted.module


@pytest.mark.parametrize("criterion", [*GRADIENT_CRITERIA, "l1"])
def test_model_that_uses_methods_and_attributes_of_an_island_is_analyzed(criterion: str) -> None:
    analysis = fxprune.analyze(build(Decoding), labelled(), criterion=criterion)
    assert [region.name for region in analysis.regions] == ["head.body.0", "head.body.1"]
    assert all(region.score > 0 for region in analysis.regions)


def test_scores_of_values_that_python_code_overwrites_later() -> None:
    """The part's input is overwritten after the part has run; its region is compared with the input as it was."""

    class Model(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.stem, self.part, self.fc = nn.Conv2d(3, 8, 3), Block(8), nn.Linear(8, 5)
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(finite(x))
            y = self.part(x)
            if self.in_place:
                x.mul_(3)
            return self.fc((y + 0 * y).mean((2, 3)))

    scores = [
        [region.score for region in fxprune.analyze(build(Model, in_place=flag), labelled()).regions]
        for flag in (False, True)
    ]
    assert scores[0] == pytest.approx(scores[1])
    assert scores[0][0] > 0


@pytest.mark.parametrize("how", ["no_grad", "detach"])
@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
def test_region_that_no_gradient_reaches_is_rejected(how: str, criterion: str) -> None:
    analysis = fxprune.analyze(build(Stopped, how=how), labelled(), criterion=criterion)
    assert [region.name for region in analysis.regions] == ["neck"]
    reasons = {rejection.name: rejection.reason for rejection in analysis.rejections}
    assert all("no gradient reaches it: " in reasons[name] for name in ("trunk.1", "trunk.2"))


@pytest.mark.parametrize("criterion", ["l1", "random", lambda region, modules: 1.0])
def test_criterion_without_gradients_keeps_regions_that_no_gradient_reaches(criterion: Any) -> None:
    analysis = fxprune.analyze(build(Stopped, how="no_grad"), labelled(), criterion=criterion)
    assert {region.name for region in analysis.regions} == {"trunk.1", "trunk.2", "neck"}


def test_model_whose_regions_no_gradient_reaches_is_refused_with_the_reasons() -> None:
    with pytest.raises(NoRegionError, match=r"trunk\.1: no gradient reaches it: .*torch\.no_grad") as caught:
        fxprune.analyze(build(Stopped, how="no_grad", neck=False), labelled(), loss=squared)
    assert "nothing in Stopped can be removed" in str(caught.value)


def test_blocks_that_the_model_calls_without_gradients_have_scores_and_stay_in_their_context() -> None:
    class Frozen(Stopped):
        """Enters the context in its own forward, so that it stays Python."""

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.trunk(x)
            return self.fc(self.neck(x).mean((2, 3)))

    analysis = fxprune.analyze(build(Frozen, how="no_grad"), labelled())
    assert {region.name: region.score > 0 for region in analysis.regions} == dict.fromkeys(
        ("trunk.1", "trunk.2", "neck"), True
    )
    assert "" not in {region.region.island for region in analysis.regions}


def test_optional_argument_of_the_loss_only_makes_the_children_islands() -> None:
    """The model gets labels in its loss and none at inference; its graph with labels is not the model."""

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Sequential(nn.Conv2d(3, 8, 3), Block(8)), nn.Linear(8, 5)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            logits = self.fc(self.body(x).mean((2, 3)))
            return logits if labels is None else nn.functional.cross_entropy(logits, labels)

    model, (raw, *_) = build(Labelled), labelled()
    adapter = choose_adapter(model, raw, lambda network, batch: network(*batch))
    adapter = replace(adapter, predict=lambda network, batch: network.eval()(batch.images[0]))
    adapted = AdaptedModel.copy_of(model, adapter)
    captured = find_all_regions(adapted, adapted.read(0, raw))
    assert [island.name for island in captured.islands] == ["body", "fc"]
    reasons = {rejection.name: rejection.reason for rejection in captured.rejections}
    assert "its graph fails on real values" in reasons["<model>"]
