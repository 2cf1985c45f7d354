"""Shared fixtures: ultralytics offline and out of the user's home, one seed for every test, models and plans."""

import copy
import os
import shutil
import signal
import tempfile

os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="fxprune-yolo-"))
os.environ.setdefault("YOLO_VERBOSE", "false")

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from benchmarks.systems import SIX, Sizes, System
from fxprune import Plan
from fxprune.cli.app import main
from fxprune.planning.analysis import Analysis
from fxprune.reporting.report import Report
from tests.commands import FEW, VAL
from tests.models import Detector, Eager, build, labelled, partly_labelled, squared, tiny


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C interrupt, here and in the processes begun here: what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


# What tests of the command line read --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pruned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of prune wrote."""
    place = tmp_path_factory.mktemp("cli") / "pruned"
    assert main(["prune", "bundled", *FEW, "--out", str(place)]) == 0
    return place


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of four of the bundled images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((VAL / "images").iterdir())[:4]:
        shutil.copy(path, folder)
    return folder


# The six systems, pruned; the tests work on copies --------------------------------------------------------------------

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


@pytest.fixture(scope="session", params=SIX, ids=lambda system: system.name)
def case(request: pytest.FixtureRequest) -> Case:
    """The plan takes three blocks in ten: bypassed and dropped, of trunks and of heads."""
    system: System = request.param
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
