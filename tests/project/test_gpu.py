"""Analysis, pruning and healing on a CUDA device give the results of the CPU.

The loaders give images on the CPU; fxprune moves them to the device of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.adapters.registry import unwrap
from fxprune.cli.app import main
from fxprune.demo.bundled import load_dataset, load_detector
from fxprune.graph.fx_utils import map_tensors
from tests.helpers.cases import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    """No TF32: products as on the CPU, to rounding."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(scope="module")
def items() -> list[Any]:
    data = load_dataset("calibration")
    return [data[index] for index in range(32)]


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return load_detector().eval()


def batches(model: nn.Module, items: list[Any], **options: Any) -> list[Any]:
    return list(fxprune.batches(model, items, batch_size=8, **options))


def devices_of(model: nn.Module) -> set[str]:
    return {value.device.type for value in unwrap(model).state_dict().values()}


@pytest.mark.parametrize("criterion", ["fisher", "fisher_mended", "grad_act"])
def test_scores_and_plans_on_cuda_equal_those_on_cpu(detector: nn.Module, items: list[Any], criterion: str) -> None:
    loader = batches(detector, items)
    here = fxprune.analyze(detector, loader, criterion=criterion)
    there = fxprune.analyze(copy.deepcopy(detector).cuda(), loader, criterion=criterion)
    wanted, scores = ({region.name: region.score for region in one.regions} for one in (here, there))
    assert scores == pytest.approx(wanted, rel=2e-2, abs=1e-4 * max(wanted.values()))
    assert [r.name for r in there.plan(0.2).removed] == [r.name for r in here.plan(0.2).removed]


@pytest.mark.parametrize("method", ["affine", "mimic"])
def test_heal_on_cuda_equals_heal_on_cpu(detector: nn.Module, items: list[Any], method: str) -> None:
    pictures = batches(detector, items, targets=False)
    plan = fxprune.analyze(detector, pictures).plan(0.15)
    found = {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(detector).to(device)
        pruned = fxprune.apply(model, plan)
        found[device] = fxprune.heal(pruned, model, pictures, method, steps=20)
        assert devices_of(found[device]) == {device}
    here, there = (fxprune.report(model).settings["heal"]["distance"] for model in found.values())
    assert there["before"] == pytest.approx(here["before"], rel=0.02)
    assert there["after"] == pytest.approx(here["after"], rel=0.1)
    assert there["after"] < 0.8 * there["before"]


@pytest.mark.parametrize("strategy", ["one_shot", "search"])
def test_compile_works_for_a_model_on_cuda(detector: nn.Module, items: list[Any], strategy: str) -> None:
    model = copy.deepcopy(detector).cuda()
    pruned = fxprune.compile(model, batches(model, items), strategy=strategy, heal="mimic", steps=10, tries=3)
    assert devices_of(pruned) == {"cuda"}
    data = load_dataset("val")
    before, after = (fxprune.evaluate(one, [data[index] for index in range(24)])["mAP"] for one in (model, pruned))
    assert after > 0.8 * before


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_latency_is_measured_on_cuda(detector: nn.Module, items: list[Any], backend: str) -> None:
    model = copy.deepcopy(detector).cuda()
    analysis = fxprune.analyze(model, batches(model, items[:8]), latency_backend=backend)
    assert analysis.before.latency_ms is not None
    assert None not in {region.latency_ms for region in analysis.regions}
    assert analysis.settings["latency"]["device"] == "cuda:0"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_pruned_model_is_compiled_for_cuda(detector: nn.Module, items: list[Any], mode: str) -> None:
    model = copy.deepcopy(detector).cuda()
    pruned = fxprune.compile(model, batches(model, items), 0.15, heal="affine")
    x = torch.rand(2, 3, 160, 160, device="cuda")
    with torch.inference_mode():
        backbone = unwrap(pruned).get_submodule("backbone")
        wanted = backbone(x)
        given: Any = torch.compile(backbone, mode=mode, dynamic=False)(x)
        for name, value in wanted.items():
            torch.testing.assert_close(given[name], value, atol=2e-3, rtol=2e-3)


def test_six_systems_are_pruned_and_healed_on_cuda(case: Case) -> None:
    model = copy.deepcopy(case.model).cuda()
    pruned = fxprune.apply(model, case.plan)
    images = case.batch["img"] if isinstance(case.batch, dict) else case.x
    pictures: list[Any] = [{"img": images} if isinstance(case.batch, dict) else images] * 4
    healed = fxprune.heal(pruned, model, pictures, "mimic", steps=2)
    assert devices_of(healed) == {"cuda"}
    with torch.no_grad():
        healed(map_tensors(case.x, torch.Tensor.cuda))


def test_command_line_prunes_on_cuda(tmp_path: Path) -> None:
    arguments = ["prune", "bundled", "--device", "cuda", "--budget", "0.1", "--out", str(tmp_path / "pruned")]
    assert main(arguments) == 0
    again = fxprune.load(load_detector().cuda(), tmp_path / "pruned")
    assert devices_of(again) == {"cuda"}
