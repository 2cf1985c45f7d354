"""The six systems of `tests.helpers.systems`, small and pruned."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fxprune
from fxprune import Plan
from tests.helpers.systems import Sizes, System

SMALL = Sizes(classifier_px=64, classifier_images=2, detector_px=128, detector_images=1)


@dataclass(frozen=True)
class Case:
    """One of the six systems in eval mode, a plan for it, and what it is after that plan.

    `batch` is labelled; `x` is what the model takes at inference.
    """

    system: System
    model: nn.Module
    plan: Plan
    pruned: nn.Module
    batch: Any
    x: Any


def make_case(system: System) -> Case:
    """Prune a system; the plan takes three blocks in ten: bypassed and dropped, of trunks and of heads."""
    model, batch = system.build(SMALL, 2 if system.family == "ultralytics" else None)  # batch norm errs on one image
    x = batch["img"] if isinstance(batch, dict) else batch[0]
    give_values(model, x)
    plan = fxprune.analyze(model, [batch], criterion="random").plan(0.3, "blocks")
    return Case(system, model, plan, fxprune.apply(model, plan), batch, x)


@torch.no_grad()
def give_values(model: nn.Module, x: Any) -> None:
    """Let random weights say something: signals that do not fade (1e-8 at the end of MobileNetV2), boxes to compare."""
    for module in model.modules():
        if hasattr(module, "score_thresh"):
            module.score_thresh = -1.0  # type: ignore[assignment]
    twin = copy.deepcopy(model)  # what a call leaves behind stays there
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 1.0
    twin([*x, *(image.flip(-1) for image in x)] if isinstance(x, list) else x)  # a norm needs two values to vary
    model.load_state_dict(twin.state_dict())
