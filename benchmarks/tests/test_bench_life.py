"""bench_life: what it measures once, the tables, and a whole small run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_life, results
from benchmarks.exported import replace_forward

SHARED: dict[str, Any] = {
    "model": "yolov8n", "images": 16, "epochs": 1, "more": 1, "budget": 0.3, "calibration": 8, "steps": 2, "seed": 0,
    "mAP50": 0.0, "int8_mAP50": 0.0, "val_images": 2, "machine": "m",
}  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_life, "RESULTS", tmp_path)
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))


def row(heal: str, training: str, score: float) -> dict[str, Any]:
    seconds = {"heal_seconds": 2.0, "train_seconds": 3.0}
    return {**SHARED, "heal": heal, "training": training, "mAP": score, "int8_mAP": score / 2, **seconds}


def test_render_shows_only_what_was_measured() -> None:
    rows = [row("unpruned", "no", 0.5), row("mimic", "distilled", 0.25)]
    *_, unpruned, mimic, empty = bench_life.render(rows)
    assert (unpruned, mimic, empty) == (
        "| unpruned | 0.500 / 0.250 / 5 | – | – |",
        "| mimic | – | – | 0.250 / 0.125 / 5 |",
        "",
    )


def test_render_shows_timings_beside_the_unpruned_detector() -> None:
    timed = {"model": "yolov8n", "timed": True, "rounds": 3, "machine": "m", "precision": "f32"}
    timed |= {"ms": {"a": 2.0}, "ratio": {"a": [1, 0.9, 1.1]}}
    assert [*bench_life.render([timed])][-1] == "| a | 2.00 | 1.00 [0.90, 1.10] |"


def test_measured_rows_are_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for heal in ("unpruned", "none"):
        results.append_row("bench_life", row(heal, "no", 0.5))
    monkeypatch.setattr(bench_life, "start_of", None)
    given = [f"--{name}={SHARED[name]}" for name in ("images", "epochs", "more", "budget", "calibration", "steps")]
    bench_life.main([*given, "--heals", "none", "--trainings", "no"])
    assert len(results.read_rows("bench_life")) == 2
    assert "| none | 0.500 / 0.250 / 5 |" in (tmp_path / "life.md").read_text()


def test_replace_forward_changes_a_copy() -> None:
    class Double:
        def __call__(self, images: Tensor) -> Tensor:
            return 2 * images

    network = nn.Identity()
    twin = replace_forward(network, Double())  # type: ignore[arg-type]
    assert torch.equal(twin(torch.ones(2)), 2 * torch.ones(2))
    assert torch.equal(network(torch.ones(2)), torch.ones(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_main_measures_every_healing_and_training() -> None:
    for package in ("ultralytics", "openvino", "nncf"):
        pytest.importorskip(package, reason=f"pip install {package}")
    given = [f"--{name}={SHARED[name]}" for name in ("images", "epochs", "more", "budget", "calibration", "steps")]
    bench_life.main([*given, "--heals", "finetune", "mimic_labelled", "--trainings", "no", "distilled"])
    rows = results.read_rows("bench_life")
    wanted = [("unpruned", "no")]
    wanted += [(heal, training) for heal in ("finetune", "mimic_labelled") for training in ("no", "distilled")]
    assert [(found["heal"], found["training"]) for found in rows] == wanted
    assert all(0 <= found["mAP"] <= 1 and 0 <= found["int8_mAP"] <= 1 for found in rows)
    assert [found["train_seconds"] > 0 for found in rows] == [training == "distilled" for _, training in wanted]
    bench_life.main([*given, "--time", "--rounds", "3"])
    timed = results.read_rows("bench_life")[-1]
    assert set(timed["ms"]) == {"unpruned float", "unpruned INT8", "pruned float", "pruned INT8", "unpruned again"}
