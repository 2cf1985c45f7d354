"""The commands that a command names as next ones: they keep its options, and can be typed as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fxprune import Plan
from fxprune.cli.app import main
from fxprune.cli.next_commands import after_analysis, after_pruning
from fxprune.cli.options import DataOptions, ModelOptions
from tests.helpers.commands import FEW, Captured

OUT = Path("my pruned")


@pytest.fixture
def boxed(plan: Plan) -> Plan:
    return replace(plan, settings=plan.settings.with_entries(boxes=3))


def test_commands_after_pruning_keep_model_weights_and_data(boxed: Plan) -> None:
    model = ModelOptions("torchvision:ssd300_vgg16", classes=4, weights="w.pt")
    data = DataOptions(images=Path("a b"), annotations=Path("a.json"), limit=9, device="cuda")
    (evaluate, _), (draw, _), (load, _) = after_pruning(boxed, model, data, OUT)
    assert evaluate == (
        "fxprune eval torchvision:ssd300_vgg16 --pruned 'my pruned' --classes 4 --weights w.pt"
        " --images 'a b' --annotations a.json --device cuda"
    )
    assert draw == ("fxprune draw torchvision:ssd300_vgg16 pruned.svg --pruned 'my pruned' --classes 4 --weights w.pt")
    assert load == "fxprune.load(model, 'my pruned')"


def test_commands_after_pruning_fit_what_there_is(plan: Plan, boxed: Plan) -> None:
    model, images = ModelOptions("m:f"), DataOptions(images=Path("i"))
    assert after_pruning(boxed, model, images, None) == ()
    assert [call.split()[1] for call, _ in after_pruning(plan, model, images, OUT)[:1]] == ["draw"]
    assert after_pruning(boxed, model, images, OUT)[0][0].endswith("--images i --annotations FILE.json")


def test_command_after_analysis_applies_the_plan_or_prunes() -> None:
    model, data = ModelOptions("m:f"), DataOptions(images=Path("i"), limit=3)
    ((saved, _),) = after_analysis(model, data, 0.2, "params", Path("o"))
    assert saved == "fxprune apply m:f o/plan.json --heal affine --out pruned --images i --limit 3"
    ((anew, _),) = after_analysis(model, data, 0.2, "params", None)
    assert anew == "fxprune prune m:f --budget 0.2 --cost params --out pruned --images i --limit 3"


def test_commands_that_are_named_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["analyze", "bundled", *FEW, "--out", "plan"]) == 0
    (call,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fxprune apply")]
    assert main(call.split()[1:]) == 0
    shown = capsys.readouterr().out
    assert "Healed" in shown
    assert "Measured on 8 images held out: pruning did not use them" in shown
    calls = [line.split()[1:] for line in shown.splitlines() if line.startswith("fxprune ")]
    assert [words[0] for words in calls if words[0] != "removed"] == ["eval", "draw"]
    assert main([*calls[-2], "--limit", "4"]) == 0
    assert "mAP" in capsys.readouterr().out
