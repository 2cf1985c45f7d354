"""Tests of `bench_paper`: table, COCO mode, and errors for missing weights and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models
from torchvision.models import _api
from ultralytics.utils import downloads

from benchmarks import bench_paper, render_paper, results, subjects
from benchmarks.tests.coco_folders import make_coco


@pytest.fixture(autouse=True)
def results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(render_paper, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_main_with_coco_uses_released_weights(
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


def test_main_names_missing_files_and_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(_api, "load_state_dict_from_url", unreachable)
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


def test_load_released_names_missing_yolo_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "safe_download", unreachable)
    with pytest.raises(SystemExit, match=r"yolov8n\.pt is missing.*looked in"):
        subjects.load_released("yolov8n.pt")


def test_render_paper_averages_seeds_and_ranks_regions(results_folder: Path) -> None:
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
