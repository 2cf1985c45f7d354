"""The recipes of docs/quantise.md run, and their results are smaller and work like the pruned models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.io import write_jpeg

import fxprune
from fxprune.demo.bundled import load_dataset
from tests.helpers.models import build
from tests.helpers.paths import ROOT
from tests.helpers.readme import blocks_under

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")),
    pytest.mark.filterwarnings("ignore:after healing:fxprune.FxpruneWarning"),
]
DOCS = (ROOT / "docs" / "quantise.md").read_text(encoding="utf-8")
SIDE, COUNT = 96, 16


def run_blocks(heading: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the python blocks under a heading; returns all names."""
    for block in blocks_under(heading, DOCS):
        exec(compile(block, "docs/quantise.md", "exec"), names)
    return names


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# A YOLO ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A folder with `best.pt` and `data.yaml`; returns the images (N, 3, H, W)."""
    ultralytics = pytest.importorskip("ultralytics", reason="pip install ultralytics")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: one, 1: two}}\n")
    images, bundled = [], load_dataset("val")
    for index in range(COUNT):
        image = nn.functional.interpolate(bundled[index][0][None], (SIDE, SIDE))[0]
        write_jpeg((image * 255).byte(), str(tmp_path / "images" / f"{index}.jpg"))
        (tmp_path / "labels" / f"{index}.txt").write_text(f"{index % 2} 0.5 0.5 0.4 0.4\n")
        images.append(image)
    yolo = ultralytics.YOLO("yolov8n.yaml")
    yolo.model = type(yolo.model)("yolov8n.yaml", nc=2, verbose=False)
    yolo.model.names = {0: "one", 1: "two"}
    yolo.ckpt = {"train_args": {"imgsz": SIDE}}  # as of a training
    yolo.save(tmp_path / "best.pt")
    return torch.stack(images)


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in (".xml", ".bin")]
    return sum(file.stat().st_size for file in files)


def test_yolo_recipe_gives_smaller_int8_detectors_that_work(started: Tensor) -> None:
    for package in ("openvino", "nncf", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"pip install {package}")
    from ultralytics import YOLO

    boxes = {"cls": torch.zeros(4, 1), "bboxes": torch.full((4, 4), 0.5), "batch_idx": torch.arange(4.0)}
    loader = [{"img": images} | boxes for images in torch.split(started, 4)]
    names = run_blocks("## A YOLO: OpenVINO or ONNX Runtime", {"loader": loader})
    with torch.no_grad():
        expected = names["pruned"].model.float().eval()(started[:1])[0]
    for kind in ("openvino", "onnx"):
        file = Path(names[f"{kind}_file"])
        whole = Path(YOLO("best.pt").export(**names["options"], format=kind))
        floats = Path(YOLO("pruned.pt").export(format=kind))
        assert size_of(file) < size_of(whole)
        assert size_of(file) < 0.5 * size_of(floats)
        int8 = YOLO(file, task="detect")
        int8.predict(np.zeros((SIDE, SIDE, 3), dtype=np.uint8), imgsz=SIDE, verbose=False)
        found: Any = int8.predictor.model(started[:1])
        found = found[0] if isinstance(found, (list, tuple)) else found
        assert relative_error(torch.as_tensor(found), expected) < 0.1
        assert 0 <= int8.val(data="data.yaml", imgsz=SIDE, plots=False, verbose=False).box.map <= 1


# A torchvision model --------------------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    """ResNet-18 with statistics of random images."""
    from torchvision.models import resnet18

    model = build(resnet18, num_classes=10).train()
    with torch.no_grad():
        for seed in range(10):
            model(torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def test_torchvision_recipe_gives_a_smaller_int8_program_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="pip install torchao")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    model = resnet()
    loader = [(torch.rand(4, 3, 64, 64), torch.arange(4)) for _ in range(4)]
    names = run_blocks("## A torchvision model: torchao", {"model": model, "calib_loader": loader})
    images = loader[0][0]
    with torch.no_grad():
        whole = torch.export.export(names["quantise"](model, [images]), (images,))
        expected = names["pruned"](images)
        assert relative_error(names["int8"](images), expected) < 0.1
        assert relative_error(names["logits"], expected) < 0.1
        loaded = torch.export.load("int8.pt2").module()
        assert relative_error(loaded(images), expected) < 0.1
    torch.export.save(whole, "whole.pt2")
    torch.export.save(torch.export.export(names["pruned"], (images,)), "floats.pt2")
    int8, unpruned, floats = ((tmp_path / f"{name}.pt2").stat().st_size for name in ("int8", "whole", "floats"))
    assert int8 < unpruned
    assert int8 < 0.5 * floats
    assert fxprune.report(names["pruned"]).removed
    torch._dynamo.reset()
