"""The evidence's own machinery: data, training that can be interrupted, the table, COCO mode."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

import fxprune
from benchmarks import bench_criteria, bench_paper, render_paper, results, subjects
from benchmarks.data import SPLITS, DigitsConfig, digit_pool, load_sources, photo_region, write_split
from benchmarks.training import draw_trained
from benchmarks.training.train_torchvision import copy_matching, fit
from benchmarks.training.train_ultralytics import write_data
from fxprune.demo.bundled import load_dataset, load_detector
from tests.test_bench_peers import make_subject

Target = dict[str, Tensor]


@pytest.fixture(autouse=True)
def results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(render_paper, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_the_same_seed_gives_the_same_pixels(tmp_path: Path) -> None:
    config, sources = DigitsConfig(size=96, val=3, seed=5), load_sources()
    first, second = (write_split(tmp_path / name, config, sources, "val") for name in ("a", "b"))
    assert first == second
    images = sorted((tmp_path / "a" / "images").iterdir())
    assert len(images) == 3
    assert all(image.read_bytes() == (tmp_path / "b" / "images" / image.name).read_bytes() for image in images)
    other = write_split(tmp_path / "c", DigitsConfig(size=96, val=3, seed=6), sources, "val")
    assert other["annotations"] != first["annotations"]


@pytest.mark.parametrize("shape", [(300, 400, 3), (640, 427, 3)])
def test_no_digit_and_no_pixel_of_a_photograph_is_in_two_splits(shape: tuple[int, ...]) -> None:
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


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(tmp_path: Path) -> None:
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


def test_only_tensors_of_the_same_name_and_shape_are_taken_over() -> None:
    source, target = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    before = target.get_parameter("1.weight").detach().clone()
    assert copy_matching(target, source.state_dict()) == 2
    assert torch.equal(target.get_parameter("0.weight"), source.get_parameter("0.weight"))
    assert torch.equal(target.get_parameter("1.weight"), before)


def test_labels_for_ultralytics_are_centres_and_sides_as_shares(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_coco(tmp_path / split / "images", tmp_path / split / "annotations.json", count=1, size=(80, 40))
    text = write_data(tmp_path).read_text()
    assert "val: val/images" in text
    (line,) = (tmp_path / "val" / "labels" / "000001.txt").read_text().splitlines()
    number, *box = line.split()
    assert number == "17"  # category 18 (dog) counted from 0
    assert [float(value) for value in box] == pytest.approx([(8 + 16) / 80, (4 + 12) / 40, 32 / 80, 24 / 40])


def write_coco(images: Path, annotations: Path, count: int, size: tuple[int, int] = (96, 64)) -> None:
    """A COCO-format folder: noise with one dog an image."""
    images.mkdir(parents=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(1, count + 1):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:06d}.jpg")
    annotations.write_text(json.dumps({
        "images": [
            {"id": n, "file_name": f"{n:06d}.jpg", "width": size[0], "height": size[1]} for n in range(1, count + 1)
        ],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 18, "bbox": [8, 4, 32, 24], "area": 600, "iscrowd": 0}
            for n in range(1, count + 1)
        ],
    }))  # fmt: skip


def make_coco(folder: Path) -> Path:
    for split in ("train", "val"):
        write_coco(folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json", count=2)
    return folder


def test_coco_mode_runs_on_released_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results_folder: Path
) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    released = models.get_model(name, weights=None, weights_backbone=None)
    file = Path(models.get_model_weights(name).DEFAULT.url).name
    torch.save(released.state_dict(), checkpoints / file)
    few = ["--criteria", "l1", "--budgets", "0.05", "--rounds", "1", "--timed-images", "1", "--agreement", "0"]
    bench_paper.main(["--coco", str(make_coco(tmp_path / "coco")), *few, "--calibration", "2", name])
    unpruned, pruned = results.read_rows("bench_paper")
    assert (unpruned["model"], unpruned["criterion"], unpruned["budget"], unpruned["regions"]) == (
        name,
        "none",
        0.0,
        [],
    )
    assert (unpruned["images"], unpruned["val_images"]) == (2, 2)
    assert pruned["flops"] <= 0.95 * unpruned["flops"]
    assert pruned["regions"]
    assert name in (results_folder / "paper.md").read_text()


def refusal_of(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        bench_paper.main(list(arguments))
    return str(stopped.value)


def test_what_is_missing_is_said_with_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    coco = str(make_coco(tmp_path / "coco"))
    said = refusal_of("--coco", coco, "retinanet_resnet50_fpn")
    assert "retinanet_resnet50_fpn_coco" in said
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in said
    assert "no detector of torchvision" in refusal_of("--coco", coco, "retinanot")
    assert "instances_val2017.json" in refusal_of("--coco", str(tmp_path / "nowhere"), "retinanet_resnet50_fpn")
    said = refusal_of("mobilenet_v2_ssdlite")
    assert str(tmp_path / "cache") in said
    assert "python -m benchmarks.training.train mobilenet_v2_ssdlite" in said


def unreachable(*args: Any, **kwargs: Any) -> None:
    raise OSError("no connection")


def test_yolo_weights_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", unreachable)
    with pytest.raises(SystemExit, match=r"yolov8n\.pt is missing.*looked in"):
        subjects.released("yolov8n.pt")


def test_the_table_averages_seeds_and_ranks_regions(results_folder: Path) -> None:
    shared = {"model": "m", "mAP50": 0.9, "flops": 90.0, "params": 9, "latency_ratio": 0.8, "latency_ratio_low": 0.7,
              "latency_ratio_high": 0.9, "latency_ms": 5.0, "timed_images": 8, "floor": 1.0, "floor_low": 0.98,
              "floor_high": 1.02}  # fmt: skip
    unpruned = shared | {"criterion": "none", "seed": 0, "budget": 0.0, "mAP": 0.8, "flops": 100.0, "regions": []}
    drawn = [
        shared | {"criterion": "random", "seed": s, "budget": 0.1, "mAP": 0.2 + 0.4 * s, "regions": [f"r{s}"]}
        for s in (0, 1)
    ]
    results.write_all("bench_paper", [unpruned, *drawn])
    regions = [
        {
            "model": "m",
            "region": f"r{n}",
            "block": n != 2,
            "mAP_drop": n / 10,
            "scores": {"random": (3.0, 2.0, 9.0, 1.0)[n]},
        }
        for n in range(4)
    ]
    results.write_all("bench_paper_regions", regions)
    render_paper.main([])
    text = (results_folder / "paper.md").read_text()
    assert "| random | 10% | 0.400 ± 0.200 | 0.400 |" in text
    assert "| m | 4 | -0.40 / -1.00 |" in text
    assert (results_folder / "paper_m.svg").stat().st_size > 5000


def test_the_benchmarks_fisher_is_the_librarys() -> None:
    calibration = load_dataset("calibration")
    some = subjects.Items([calibration[index] for index in range(4)], dict(calibration.categories))
    subject = subjects.Subject("bundled", load_detector(), some, some, None)
    taken, make = bench_criteria.VARIANTS["fisher"]
    found = {name: make(sums) for name, sums in bench_criteria.Captive(subject).collect(taken).items()}
    known = {r.name: r.score for r in fxprune.analyze(subject.model, subject.batches(), criterion="fisher").regions}
    assert {name: found[name] for name in known} == pytest.approx(known, rel=1e-3)


def test_detectors_are_drawn_with_what_would_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_trained, "subjects", lambda options: [make_subject()])
    draw_trained.main(["--budget", "0.2", "--out", str(tmp_path / "pictures")])
    page, still = ((tmp_path / "pictures" / f"tiny.{suffix}").read_text() for suffix in ("html", "svg"))
    assert '"initial":19' in page.replace(" ", "")
    assert "removed" in still
