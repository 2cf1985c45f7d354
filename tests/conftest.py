"""Shared fixtures: an offline ultralytics, one seed for every test, models and plans."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Plan
from fxprune.cli.app import main
from fxprune.planning.analysis import Analysis
from fxprune.reporting.report import Report
from tests.helpers.cases import Case, make_case
from tests.helpers.commands import FEW, VAL
from tests.helpers.environment import set_environment
from tests.helpers.models import Detector, Eager, build, labelled, partly_labelled, squared, tiny
from tests.helpers.systems import SIX

set_environment()


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


@pytest.fixture(scope="session", params=SIX, ids=lambda system: system.name)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)
