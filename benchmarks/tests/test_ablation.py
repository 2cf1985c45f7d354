"""Scores by ablation are the true increases of the loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset

import fxprune
from benchmarks.ablation import analyze_by, analyze_by_ablation, plan_removing
from fxprune.adapters.torchvision import ADAPTER
from fxprune.demo.bundled import load_dataset, load_detector
from tests.helpers.models import labelled, tiny


def test_ablation_of_a_classifier_is_the_increase_of_its_loss() -> None:
    model, batches = tiny(), labelled()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(network.eval()(images), labels))

    analysis = analyze_by_ablation(model, batches)
    assert analysis.settings["criterion"] == "ablation"
    size = max(loss(model), 1.0)  # the loss of a single part is taken relative to 1 at least
    for region in analysis.regions:
        pruned = fxprune.apply(model, plan_removing(analysis, {region.name}))
        assert region.score == pytest.approx((loss(pruned) - loss(model)) / size, abs=1e-4)


def test_ablation_of_a_detector_weighs_the_parts_of_its_loss() -> None:
    detector = load_detector()
    (batch,) = fxprune.batches(detector, Subset(load_dataset("calibration"), range(4)), batch_size=4)
    analysis = analyze_by_ablation(detector, [batch])
    (region,) = analysis.plan(1e-6).removed

    def losses(model: nn.Module) -> Tensor:
        network = copy.deepcopy(model)
        return ADAPTER.loss(network, ADAPTER.normalize(network, batch)).detach()

    before, after = losses(detector), losses(fxprune.apply(detector, plan_removing(analysis, {region.name})))
    assert len(before) == 2
    assert region.score == pytest.approx(float(((after - before) / before).sum()), abs=1e-4)


def test_analyze_by_takes_criteria_of_the_library_too() -> None:
    model = tiny()
    assert analyze_by("l1", model, labelled()).regions == fxprune.analyze(model, labelled(), criterion="l1").regions
