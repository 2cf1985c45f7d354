"""Ultralytics models of other than three channels, on images of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import ultralytics
import yaml
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

import fxprune
from fxprune.adapters.ultralytics.adapter import input_channels
from fxprune.adapters.ultralytics.letterbox import match_channels

Item = tuple[Tensor, dict[str, Tensor]]


def detector(channels: int) -> nn.Module:
    """An untrained YOLO11n of two classes."""
    recipe = Path(ultralytics.__file__).parent / "cfg/models/11/yolo11.yaml"
    made: nn.Module = DetectionModel(
        yaml.safe_load(recipe.read_text()) | {"nc": 2, "scale": "n"}, ch=channels, nc=2, verbose=False
    )
    return made.eval()


def items(channels: int) -> list[Item]:
    target = {"boxes": torch.tensor([[4.0, 4, 30, 28]]), "labels": torch.tensor([1])}
    return [(torch.rand(channels, 40, 52), target) for _ in range(2)]


def options() -> dict[str, Any]:
    return {"image_size": 64, "labels": {0: 0, 1: 1}}


@pytest.mark.parametrize("given", [1, 3])
def test_model_of_one_channel_reads_rgb_as_grey(given: int) -> None:
    model = detector(1)
    (batch,) = fxprune.batches(model, items(given), batch_size=2, **options())
    assert batch["img"].shape == (2, 1, 64, 64)
    assert fxprune.analyze(model, [batch]).regions
    assert set(fxprune.evaluate(model, items(given), **options())) >= {"mAP", "mAP50"}


def test_grey_is_that_of_an_image_read_without_colours(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels[..., ::-1])
    read = torch.from_numpy(np.asarray(cv2.imread(str(tmp_path / "image.png"), cv2.IMREAD_GRAYSCALE)))
    grey = match_channels(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, 1)
    torch.testing.assert_close(grey[0] * 255, read.float(), atol=1.0, rtol=0)


def test_model_of_four_channels_takes_a_data_set_of_four() -> None:
    (batch,) = fxprune.batches(detector(4), items(4), batch_size=2, **options())
    assert batch["img"].shape == (2, 4, 64, 64)


@pytest.mark.parametrize("call", ["batches", "evaluate"])
def test_other_numbers_of_channels_are_refused_with_both_numbers(call: str) -> None:
    model = detector(4)
    assert input_channels(model) == 4
    with pytest.raises(fxprune.BatchError, match=r"takes images of 4 channels, the data set gives 3: .*own loader"):
        list(fxprune.batches(model, items(3), **options())) if call == "batches" else fxprune.evaluate(
            model, items(3), **options()
        )
