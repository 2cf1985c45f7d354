"""Tests of `bench_doubt`: standard errors of the accuracy that deeper cuts lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from benchmarks import bench_deeper, bench_doubt, results
from benchmarks.subjects import Subject
from benchmarks.tests.tiny_subject import make_subject
from fxprune.datasets.evaluation import Boxes


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for module in (bench_deeper, bench_doubt):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))


def boxes(*xywh: tuple[float, ...]) -> Boxes:
    count = len(xywh)
    ones, places = np.ones(count), np.array(xywh, dtype=float).reshape(-1, 4)
    return Boxes(places, np.ones(count, dtype=np.int64), ones, 100 * ones, np.zeros(count, dtype=bool))


def test_standard_error_of_a_mean_over_images_matches_theory() -> None:
    truth = [boxes((0, 0, 10, 10))] * 100
    half = [boxes((0, 0, 10, 10)) if index % 2 else boxes() for index in range(100)]
    lost = bench_doubt.bootstrap_map(truth, truth) - bench_doubt.bootstrap_map(truth, half)
    assert lost.mean() == pytest.approx(0.5, abs=0.02)
    assert lost.std(ddof=1) == pytest.approx(0.05, rel=0.3)  # of a share of 1/2 among 100: the root of 1/4 / 100
    assert not (bench_doubt.bootstrap_map(truth, half) - bench_doubt.bootstrap_map(truth, half)).any()


def test_main_measures_kept_models_once_and_again_after_new_healing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject, measured = make_subject(), []
    monkeypatch.setattr(Subject, "unlabelled_batches", Subject.batches)
    found_by = bench_doubt.find_boxes

    def noted(subject: Subject, model: nn.Module) -> tuple[list[Boxes], list[Boxes]]:
        measured.append(model)
        return found_by(subject, model)

    monkeypatch.setattr(bench_doubt, "find_boxes", noted)
    monkeypatch.setattr(bench_doubt, "DRAWS", 5)
    for module in (bench_deeper, bench_doubt):
        monkeypatch.setattr(module, "load_subjects", lambda options: [subject])
    bench_deeper.main(["tiny", "--strategies", "one_shot", "--heals", "none", "affine", "--budgets", ".2"])
    bench_doubt.main(["tiny"])
    assert len(measured) == 2
    (row,) = results.read_rows("bench_doubt")
    assert (row["heal"], row["budget"], row["draws"]) == ("affine", 0.2, 5)
    (line,) = (tmp_path / "doubt.md").read_text().splitlines()[2:]
    assert line.startswith("| tiny | 20% flops, one_shot | affine | ")
    bench_doubt.main(["tiny"])
    assert len(measured) == 2
    none, affine = results.read_rows("bench_deeper")
    results.write_all("bench_deeper", [none, affine | {"mAP": affine["mAP"] + 0.01}])
    bench_doubt.main(["tiny"])
    assert len(measured) == 4
    assert len(results.read_rows("bench_doubt")) == 1
    assert "20% flops: lost" in capsys.readouterr().err
