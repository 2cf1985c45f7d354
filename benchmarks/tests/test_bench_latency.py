"""Tests of `bench_latency`: rows and table of predicted and measured latency cuts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_latency, results
from benchmarks.subjects import Subject
from benchmarks.tests.tiny_subject import make_subject
from fxprune.demo.bundled import load_detector
from fxprune.planning import analyzer
from fxprune.profiling.latency import Backend, Latency, node_probe

ON = {"device": "cpu", "images": 4, "threads": 1, "rounds": 15, "floor": 0.02}


@pytest.fixture(autouse=True)
def results_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (results, bench_latency):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def measure(backend: Backend, model: Any, captured: Any, graphs: Any, regions: Any, *_: Any, **__: Any) -> Latency:
    """Stands in for the measuring: every region a quarter by its nodes, a fifth by itself."""
    share = 0.25 if backend.probe is node_probe else 0.2
    return Latency(8.0, {region.name: 8.0 * share for region in regions}, ON)


def test_main_predicts_each_plan_two_ways_and_measures_it(
    results_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(_: Any) -> Iterator[Subject]:
        yield make_subject()

    monkeypatch.setattr(bench_latency, "load_subjects", one)
    monkeypatch.setattr(analyzer, "measure_latency", measure)
    monkeypatch.setattr(bench_latency, "measure_latency", measure)
    bench_latency.main(["--budgets", "0.2", "0.3", "0.01", "--rounds", "2"])
    rows = [json.loads(line) for line in (results_folder / "bench_latency.jsonl").read_text().splitlines()]
    assert [(row["detector"], row["backend"], row["budget"], row["images"]) for row in rows] == [
        ("tiny", "eager", 0.2, 4),
        ("tiny", "eager", 0.3, 4),
    ]
    for row, count in zip(rows, (1, 2), strict=True):
        assert len(row["removed"]) == count
        assert (row["nodes"], row["pieces"]) == pytest.approx((0.25 * count, 0.2 * count))
        assert row["latency_cut_low"] <= row["latency_cut"] <= row["latency_cut_high"]
        assert row["floor_low"] <= row["floor"] <= row["floor_high"]
    printed = capsys.readouterr().out
    assert "budget 0.01" in printed
    assert "noise" in printed
    lines = (results_folder / "latency.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| tiny | eager | 4 | ")
    assert "| **25.0%** | 20.0% |" in lines[2]


@pytest.mark.parametrize(
    ("backend", "predicted", "error", "end"),
    [
        ("eager", 0.11, 0.004, ["+10% ± 4%", "met"]),
        ("eager", 0.08, 0.004, ["-20% ± 4%", "missed"]),
        ("inductor", 0.08, 0.02, ["+0% ± 20%", "too noisy"]),
    ],
)
def test_format_cells_says_whether_the_goal_is_met(
    backend: str, predicted: float, error: float, end: list[str]
) -> None:
    row = {"detector": "d", "backend": backend, "images": 8, "ms": 50.0, "budget": 0.1, "flops_cut": 0.2,
           "boxes": False, "nodes": predicted, "pieces": 0.1, "latency_cut": 0.1, "latency_cut_low": 0.09,
           "latency_cut_high": 0.11, "floor": 1.0, "floor_low": 0.99, "floor_high": 1.01, "error": error}  # fmt: skip
    cells = list(bench_latency.format_cells(row))
    assert cells[-2:] == end
    assert cells[6 if backend == "eager" else 7].startswith("**")


def test_silenced_detector_finds_no_boxes() -> None:
    detector = load_detector()
    images = [torch.rand(3, 160, 160)]
    with torch.no_grad():
        detector.score_thresh = -1.0
        assert len(detector(images)[0]["boxes"])
        bench_latency.suppress_detections(detector)
        assert not len(detector(images)[0]["boxes"])
