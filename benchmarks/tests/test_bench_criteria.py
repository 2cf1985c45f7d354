"""The benchmark of criteria against the library."""

from __future__ import annotations

import pytest

import fxprune
from benchmarks import bench_criteria, subjects
from fxprune.demo.bundled import load_dataset, load_detector


def test_fisher_of_the_benchmark_equals_fisher_of_the_library() -> None:
    calibration = load_dataset("calibration")
    some = subjects.Items([calibration[index] for index in range(4)], dict(calibration.categories))
    subject = subjects.Subject("bundled", load_detector(), some, some, None)
    taken, make = bench_criteria.VARIANTS["fisher"]
    found = {name: make(sums) for name, sums in bench_criteria.CapturedDetector(subject).collect(taken).items()}
    known = {r.name: r.score for r in fxprune.analyze(subject.model, subject.batches(), criterion="fisher").regions}
    assert {name: found[name] for name in known} == pytest.approx(known, rel=1e-3)
