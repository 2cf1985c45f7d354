"""Pruned models through torch.export, ONNX, OpenVINO and ExecuTorch: what exports unpruned exports pruned, smaller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import retinanet_resnet50_fpn, ssdlite320_mobilenet_v3_large

import fxprune
from tests.models import labelled, pixels, tiny

onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="pip install onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")

CONVOLUTIONS = ("Conv", "FusedConv")


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def classifier(name: str) -> Callable[[], tuple[nn.Module, Any, Tensor]]:
    def make() -> tuple[nn.Module, Any, Tensor]:
        model = seeded(lambda: models.get_model(name, weights=None))
        x = pixels(2, 3, 64, 64)
        return model, [(x, torch.arange(2))], x

    return make


def tiny_case() -> tuple[nn.Module, Any, Tensor]:
    return tiny(), labelled(), pixels(2, 3, 16, 16)


CASES = {
    "tiny": tiny_case,
    "mobilenet_v2": classifier("mobilenet_v2"),
    "shufflenet_v2_x1_0": classifier("shufflenet_v2_x1_0"),
    "resnet50": classifier("resnet50"),
}
SIX = [pytest.param(name, marks=() if name in ("tiny", "mobilenet_v2") else pytest.mark.slow) for name in CASES]


def to_onnx(model: nn.Module, x: Tensor, file: Path) -> Any:
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False)
    assert program is not None
    program.save(file)
    return onnx.load(file)


def convolutions(proto: Any) -> int:
    return sum(node.op_type in CONVOLUTIONS for node in proto.graph.node)


@pytest.mark.parametrize("name", SIX)
def test_onnx_is_smaller_and_gives_the_same(name: str, tmp_path: Path) -> None:
    model, loader, x = CASES[name]()
    pruned = fxprune.compile(model, loader, 0.2, criterion="l1")
    before, after = to_onnx(model, x, tmp_path / "whole.onnx"), to_onnx(pruned, x, tmp_path / "pruned.onnx")
    assert len(after.graph.node) < len(before.graph.node)
    assert (tmp_path / "pruned.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size
    layers = sum(isinstance(module, nn.Conv2d) for module in pruned.modules())
    assert convolutions(after) == layers < convolutions(before)
    session = runtime.InferenceSession(str(tmp_path / "pruned.onnx"))
    more = torch.cat([x, x.flip(0), x[:1]])  # the batch stays free
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    np.testing.assert_allclose(found, pruned(more).detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SIX)
def test_torch_export_is_smaller_and_gives_the_same(name: str, tmp_path: Path) -> None:
    model, loader, x = CASES[name]()
    pruned = fxprune.compile(model, loader, 0.2, criterion="l1")
    programs = [torch.export.export(net, (x,)) for net in (model, pruned)]
    assert len(programs[1].graph.nodes) < len(programs[0].graph.nodes)
    assert set(programs[1].state_dict) == set(pruned.state_dict()) < set(programs[0].state_dict)
    torch.export.save(programs[1], tmp_path / "pruned.pt2")
    again = torch.export.load(tmp_path / "pruned.pt2")
    torch.testing.assert_close(again.module()(x), pruned(x))


@pytest.mark.slow
def test_the_backbone_of_a_detector(tmp_path: Path) -> None:
    model = seeded(lambda: retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=96, max_size=96))
    plan = fxprune.analyze(model, [list(pixels(2, 3, 96, 96))], criterion=backbone_first).plan(0.1)
    pruned = fxprune.apply(model, plan)
    assert {region.island for region in plan.removed} == {"backbone"}
    x = pixels(1, 3, 96, 96)
    before = to_onnx_list(model.get_submodule("backbone"), x, tmp_path / "whole.onnx")
    after = to_onnx_list(pruned.get_submodule("backbone"), x, tmp_path / "pruned.onnx")
    assert convolutions(after) < convolutions(before)
    session = runtime.InferenceSession(str(tmp_path / "pruned.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for value, expected in zip(found, pruned.get_submodule("backbone")(x).values(), strict=True):
        np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-3, atol=1e-4)


def backbone_first(region: Any, modules: Any) -> float:
    return float(region.island != "backbone")


def to_onnx_list(model: nn.Module, x: Tensor, file: Path) -> Any:
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    return onnx.load(file)


@pytest.mark.slow
def test_a_whole_detector_exports_if_it_did_unpruned() -> None:
    model = seeded(lambda: ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None))
    images = [pixels(3, 320, 320)]
    pruned = fxprune.compile(model, [images], 0.05, criterion="l1")
    try:
        whole = torch.export.export(model, (images,), strict=False)
    except Exception as error:  # the exporter fails on detectors in ways of its own
        pytest.skip(f"torch.export does not take the unpruned detector: {type(error).__name__}")
    assert len(torch.export.export(pruned, (images,), strict=False).graph.nodes) < len(whole.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_yolo_exports_through_its_own_method(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(form, reason=f"pip install {form}")
    from ultralytics import YOLO

    monkeypatch.chdir(tmp_path)
    model: Any = YOLO("yolov8n.yaml")
    pruned: Any = fxprune.compile(model, [pixels(1, 3, 64, 64)], 0.2, criterion="l1")
    sizes = []
    for name, net in (("whole", model), ("pruned", pruned)):
        net.ckpt_path = str(tmp_path / f"{name}.pt")
        net.model.pt_path = str(tmp_path / f"{name}.pt")
        exported = Path(net.export(format=form, imgsz=64, simplify=False))
        files = [exported] if exported.is_file() else [file for file in exported.rglob("*") if file.is_file()]
        sizes.append(sum(file.stat().st_size for file in files))
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_executorch(tmp_path: Path) -> None:
    exir = pytest.importorskip("executorch.exir", reason="pip install executorch")
    model, loader, x = CASES["mobilenet_v2"]()
    pruned = fxprune.compile(model, loader, 0.2, criterion="l1")
    sizes = [len(exir.to_edge(torch.export.export(net, (x,))).to_executorch().buffer) for net in (model, pruned)]
    assert sizes[1] < sizes[0]
