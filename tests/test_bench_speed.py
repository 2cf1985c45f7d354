"""Regions cut out and run by themselves, and the rows of realized latency that are made with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from benchmarks import bench_speed, results
from benchmarks.bench_time import captured
from benchmarks.pieces import cut_out, prepared
from fxprune import Plan
from tests.models import Block, build, labelled, pixels

X = pixels(2, 3, 16, 16)


def test_a_piece_computes_what_its_region_does(detector: nn.Module, detector_plan: Plan) -> None:
    twin, islands = captured(detector, X, False)
    pieces = cut_out(twin, islands, detector_plan.removed, X)
    assert [piece.name for piece in pieces] == [region.name for region in detector_plan.removed]
    graphs = {island.name: island.gm for island in islands}
    value = X
    values: dict[str, dict[str, Tensor]] = {}
    for island in ("body", "head"):  # what is between them changes nothing
        interpreter = fx.Interpreter(graphs[island], garbage_collect_values=False)
        value = interpreter.run(value)
        values[island] = {node.name: found for node, found in interpreter.env.items()}
    for piece, region in zip(pieces, detector_plan.removed, strict=True):
        (call,) = piece.calls
        assert isinstance(piece.module, nn.Module)
        found = piece.module(*call)
        torch.testing.assert_close(found, values[region.island][region.exit])
        assert sum(p.numel() for p in piece.module.parameters()) == region.params > 0


class Twice(nn.Module):
    """Runs the same captured modules once for each half of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        halves = [half for half in x.chunk(2, -1) if bool(torch.isfinite(half).all())]
        return self.fc(torch.stack([self.body(half).mean((2, 3)) for half in halves]).sum(0))


def test_a_piece_runs_as_often_as_the_model_runs_it() -> None:
    model = build(Twice)
    plan = fxprune.analyze(model, labelled(), criterion="l1").plan(0.5, "blocks")
    twin, islands = captured(model, X, False)
    (piece,) = cut_out(twin, islands, plan.removed, X)
    assert len(piece.calls) == 2
    seen: list[tuple[Tensor, ...]] = []
    (again,) = prepared([piece], lambda module: lambda *values: seen.append(values))
    again.run()
    assert [tuple(value.shape for value in values) for values in seen] == [((2, 8, 16, 8),)] * 2


def test_rows_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert row["own_time"] > 0
        assert row["realized"] == pytest.approx((1 - row["ratio"]) / row["own_time"])
        assert row["floor_low"] <= row["floor"] <= row["floor_high"]
    lines = (tmp_path / "speed.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| mobilenet_v2 | eager | 2 | 10% |")
