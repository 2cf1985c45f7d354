"""Tests of `bench_speed`: the rows of measured latency, and the table made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_speed, results
from tests.helpers.models import pixels

X = pixels(2, 3, 16, 16)


def test_main_writes_rows_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (results, bench_speed):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    options = ["--backends", "eager", "--batches", "2", "--rounds", "2", "--classifier-px", "32"]
    bench_speed.main(["--systems", "mobilenet_v2", *options])
    rows = [json.loads(line) for line in (tmp_path / "bench_speed.jsonl").read_text().splitlines()]
    assert [(row["system"], row["backend"], row["images"], row["budget"]) for row in rows] == [
        ("mobilenet_v2", "eager", 2, 0.1),
        ("mobilenet_v2", "eager", 2, 0.2),
    ]
    for row in rows:
        assert row["flops_cut"] >= row["budget"]
        assert row["realized"] == pytest.approx((1 - row["ratio"]) / row["own_time"])
        assert row["floor_low"] <= row["floor"] <= row["floor_high"]
    lines = (tmp_path / "speed.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| mobilenet_v2 | eager | 2 | 10% |")
