"""The demo on the bundled detector and images, and the bundled files themselves."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from fxprune.cli.app import main
from fxprune.demo.bundled import CLASS_NAMES, build_detector, load_dataset, load_detector
from fxprune.demo.run import run_demo
from fxprune.errors import BudgetError, FxpruneError


def test_demo_prints_one_table_of_map_and_removed_regions() -> None:
    out = Console(file=io.StringIO(), width=80)
    rows = run_demo(out, Console(file=io.StringIO()), 0.1, ("fisher",))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    unpruned, pruned = rows
    assert unpruned.plan is None
    assert pruned.plan is not None
    assert 0.7 < unpruned.scores["mAP"] < 1
    assert pruned.plan.after.flops <= 0.9 * pruned.plan.before.flops
    assert f"{unpruned.scores['mAP']:.3f}" in text
    assert f"{pruned.scores['mAP']:.3f}" in text
    assert all(region.name in text for region in pruned.plan.removed)
    assert max(map(len, text.splitlines())) <= 80


def test_demo_refuses_a_wrong_budget_at_once() -> None:
    with pytest.raises(BudgetError, match="between 0 and 1"):
        run_demo(Console(file=io.StringIO()), Console(file=io.StringIO()), 1.5)
    assert main(["demo", "--budget", "1.5"]) == 1


def test_python_dash_m_runs_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxprune", "demo", "--help"], capture_output=True, text=True, check=True
    )
    assert "--budget" in done.stdout
    assert "--criterion" in done.stdout


def test_load_dataset_gives_the_bundled_splits() -> None:
    val, calibration = load_dataset("val"), load_dataset("calibration")
    assert (len(val), len(calibration)) == (200, 64)
    image, target = calibration[0]
    assert image.shape == (3, 160, 160)
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    assert target["boxes"].shape == (len(target["labels"]), 4)
    assert 1 <= int(target["labels"].min()) <= int(target["labels"].max()) < len(CLASS_NAMES)
    with pytest.raises(FxpruneError, match="no bundled split"):
        load_dataset("train")  # type: ignore[arg-type]


def test_bundled_detector_has_its_trained_weights() -> None:
    trained, fresh = load_detector(), build_detector()
    assert not trained.training
    first, second = trained.state_dict(), fresh.state_dict()
    assert set(first) == set(second)
    assert all(value.dtype == torch.float32 for value in first.values() if value.is_floating_point())
    assert not torch.equal(first["backbone.laterals.0.0.weight"], second["backbone.laterals.0.0.weight"])
