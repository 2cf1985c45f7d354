"""Shared fixtures: ultralytics offline and out of the user's home, one seed for every test, tiny models and plans."""

import os
import tempfile

os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="fxprune-yolo-"))
os.environ.setdefault("YOLO_VERBOSE", "false")

from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Plan
from fxprune.analysis import Analysis
from fxprune.report import Report
from tests.models import Detector, Eager, build, labelled, partly_labelled, squared, tiny


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


# Models, plans and a report that a module's tests read and none of them changes ---------------------------------------


@pytest.fixture(scope="module")
def tiny_model() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def analysis(tiny_model: nn.Module) -> Analysis:
    return fxprune.analyze(tiny_model, labelled())


@pytest.fixture(scope="module")
def plan(analysis: Analysis) -> Plan:
    """Takes two of four blocks out of `tiny_model`."""
    return analysis.plan(0.3)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return build(Detector)


@pytest.fixture(scope="module")
def detector_plan(detector: nn.Module) -> Plan:
    """Takes something out of both islands of `detector`."""
    cheap = ("body.1", "head.0")
    analysis = fxprune.analyze(detector, labelled(), criterion=lambda region, _: float(region.name not in cheap))
    made = analysis.plan(0.3)
    assert [region.name for region in made.removed] == [*cheap]
    return made


@pytest.fixture(scope="module")
def pruned_tiny(tiny_model: nn.Module) -> nn.Module:
    return fxprune.compile(tiny_model, partly_labelled(), 0.3)


@pytest.fixture(scope="module")
def pruned_twice(pruned_tiny: nn.Module) -> nn.Module:
    return fxprune.compile(pruned_tiny, partly_labelled(), 0.2, criterion="l1", cost="params")


@pytest.fixture(scope="module")
def report(pruned_tiny: nn.Module) -> Report:
    return fxprune.report(pruned_tiny)


@pytest.fixture(scope="module")
def pruned_eager() -> Any:
    return fxprune.compile(build(Eager), labelled(), loss=squared, criterion="l1")
