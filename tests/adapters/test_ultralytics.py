"""A pruned YOLO keeps its kind: predict, val, fuse, save and reload work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fxprune
from fxprune.adapters.ultralytics.yolo import rewrap_yolo
from tests.helpers.batches import batched

ultralytics = pytest.importorskip("ultralytics")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return ultralytics.YOLO("yolov8n.yaml")


@pytest.fixture(scope="module")
def pruned(model: Any) -> Any:
    return fxprune.compile(model, [batched(128, 160)], budget=0.1)


def test_compile_of_a_yolo_returns_a_yolo(model: Any, pruned: Any) -> None:
    assert isinstance(pruned, type(model))
    assert pruned is not model
    assert pruned.model is not model.model
    assert type(pruned.model) is type(model.model)
    counts = [sum(value.numel() for value in yolo.model.parameters()) for yolo in (model, pruned)]
    assert counts[1] < counts[0]


def test_pruned_yolo_layers_keep_their_ultralytics_attributes(model: Any, pruned: Any) -> None:
    for twin in (pruned.model, copy.deepcopy(pruned.model)):
        for old, new in zip(model.model.model, twin.model, strict=True):
            assert (old.f, old.i, old.type) == (new.f, new.i, new.type)


def test_box_decoder_weights_are_no_candidate(pruned: Any) -> None:
    report = fxprune.report(pruned)
    assert not any("dfl" in layer for region in report.regions for layer in region.layers)
    assert "model.22.dfl.conv.weight" in pruned.model.state_dict()


def test_pruned_yolo_predicts(pruned: Any) -> None:
    twin: Any = rewrap_yolo(pruned, copy.deepcopy(pruned.model))
    image = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    (result,) = twin.predict(image, imgsz=160, verbose=False, conf=0.001)
    assert result.boxes is not None


def test_pruned_yolo_val_gives_metrics(pruned: Any, tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.jpg")
        (tmp_path / "labels" / f"{index}.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    names = {index: str(index) for index in range(80)}
    settings = {"path": str(tmp_path), "train": "images", "val": "images", "names": names}
    (tmp_path / "data.yaml").write_text(json.dumps(settings))
    twin: Any = rewrap_yolo(pruned, copy.deepcopy(pruned.model))
    metrics = twin.val(
        data=str(tmp_path / "data.yaml"),
        imgsz=96,
        batch=2,
        workers=0,
        plots=False,
        verbose=False,
        project=str(tmp_path),
    )
    assert 0 <= metrics.box.map <= 1


def test_pruned_yolo_fuse_keeps_outputs_up_to_rounding(pruned: Any) -> None:
    twin = copy.deepcopy(pruned.model).eval()
    x = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        before = twin(x)[0]
        after = twin.fuse(verbose=False)(x)[0]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in twin.modules())
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-2)


def test_fused_yolo_can_be_pruned(model: Any) -> None:
    fused = copy.deepcopy(model.model).eval().fuse(verbose=False)
    smaller = fxprune.compile(fused, [batched(96, 96)], budget=0.05)
    with torch.no_grad():
        assert smaller(torch.rand(1, 3, 96, 96))[0].shape == fused(torch.rand(1, 3, 96, 96))[0].shape


def test_pruned_yolo_save_and_reload_is_bit_equal(pruned: Any, tmp_path: Path) -> None:
    path = tmp_path / "pruned.pt"
    twin: Any = rewrap_yolo(pruned, copy.deepcopy(pruned.model))
    twin.save(path)
    reloaded = torch.load(path, weights_only=False)["model"].float().eval()
    expected = copy.deepcopy(pruned.model).half().float().eval()
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(reloaded(x)[0], expected(x)[0])
    assert fxprune.report(reloaded).to_dict() == fxprune.report(pruned).to_dict()


def test_a_pruned_yolo_object_is_copied_and_pickled_whole(pruned: Any, tmp_path: Path) -> None:
    torch.save(pruned, tmp_path / "object.pt")
    for twin in (copy.deepcopy(pruned), torch.load(tmp_path / "object.pt", weights_only=False)):
        assert type(twin) is type(pruned)
        x = torch.rand(1, 3, 96, 96)
        with torch.no_grad():
            assert torch.equal(twin.model.eval()(x)[0], pruned.model.eval()(x)[0])
        twin.callbacks["on_train_end"].append(print)
    assert print not in pruned.callbacks["on_train_end"]
