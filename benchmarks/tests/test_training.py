"""Tests of the digits data and of training: the same data from a seed, the same weights after an interruption."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.data import SPLITS, DigitsConfig, digit_pool, load_sources, photo_region, write_split
from benchmarks.tests.coco_folders import write_coco
from benchmarks.training.train_torchvision import copy_matching, fit
from benchmarks.training.train_ultralytics import write_data

Target = dict[str, Tensor]


def test_write_split_same_seed_gives_the_same_pixels(tmp_path: Path) -> None:
    config, sources = DigitsConfig(size=96, val=3, seed=5), load_sources()
    first, second = (write_split(tmp_path / name, config, sources, "val") for name in ("a", "b"))
    assert first == second
    images = sorted((tmp_path / "a" / "images").iterdir())
    assert len(images) == 3
    assert all(image.read_bytes() == (tmp_path / "b" / "images" / image.name).read_bytes() for image in images)
    other = write_split(tmp_path / "c", DigitsConfig(size=96, val=3, seed=6), sources, "val")
    assert other["annotations"] != first["annotations"]


@pytest.mark.parametrize("shape", [(300, 400, 3), (640, 427, 3)])
def test_splits_share_no_digit_and_no_photo_pixel(shape: tuple[int, ...]) -> None:
    labels = load_sources().labels
    pools = [set(digit_pool(labels, split, 0).tolist()) for split in SPLITS]
    assert sum(map(len, pools)) == len(set().union(*pools)) == len(labels)
    used = np.zeros(shape[:2], dtype=int)
    for split in SPLITS:
        top, left, bottom, right = photo_region(shape, split)
        used[top:bottom, left:right] += 1
    assert used.max() == 1


class Stub(nn.Module):
    """Takes and gives what a torchvision detector does in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3))

    def forward(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        found = self.layers(torch.stack(images)).float().mean((1, 2, 3))
        return {
            "loss": (found - torch.stack([t["boxes"].mean() for t in targets])).square().mean() + torch.rand(()) * 0
        }


class Interruption(Exception):
    """Stands for a run that is killed."""


def test_fit_resumed_after_an_interruption_gives_the_same_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        (
            torch.rand(3, 12, 12, generator=generator),
            {"boxes": torch.rand(1, 4, generator=generator), "labels": torch.ones(1)},
        )
        for _ in range(40)
    ]
    options = argparse.Namespace(epochs=4, seed=3, device="cpu")

    def run(checkpoint: Path, stop_after: int) -> dict[str, Tensor]:
        torch.manual_seed(7)
        model = Stub()

        def report(epoch: int, loss: float, seconds: float) -> None:
            if epoch > stop_after:
                raise Interruption

        fit(model, samples, report, 1e-2, checkpoint, options)
        return model.state_dict()

    whole = run(tmp_path / "whole.pt", stop_after=9)
    with pytest.raises(Interruption):
        run(tmp_path / "halves.pt", stop_after=2)
    halves = run(tmp_path / "halves.pt", stop_after=9)
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_copy_matching_takes_tensors_of_equal_name_and_shape() -> None:
    source, target = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    before = target.get_parameter("1.weight").detach().clone()
    assert copy_matching(target, source.state_dict()) == 2
    assert torch.equal(target.get_parameter("0.weight"), source.get_parameter("0.weight"))
    assert torch.equal(target.get_parameter("1.weight"), before)


def test_write_data_gives_normalized_centres_and_sides(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path / split / "images", tmp_path / split / "annotations.json", count=1, size=(80, 40))
    text = write_data(tmp_path).read_text()
    assert "val: val/images" in text
    (line,) = (tmp_path / "val" / "labels" / "000001.txt").read_text().splitlines()
    number, *box = line.split()
    assert number == "17"  # category 18 (dog) counted from 0
    assert [float(value) for value in box] == pytest.approx([(8 + 16) / 80, (4 + 12) / 40, 32 / 80, 24 / 40])
