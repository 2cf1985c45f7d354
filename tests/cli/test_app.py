"""The commands in process, on the bundled detector and few of its images: results and errors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.cli import steps
from fxprune.cli.app import main
from fxprune.cli.tables import draw_curve
from fxprune.demo.bundled import load_detector
from fxprune.planning import analyzer
from fxprune.profiling.latency import BACKENDS, Latency
from fxprune.visualize import draw as drawing
from tests.helpers.commands import FEW, Captured, refusal


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for the drawing; the things it was given."""
    things: list[Any] = []

    def draw(what: Any, path: Path, plan: Any = None) -> None:
        things.append(what)
        Path(path).write_text("picture", encoding="utf-8")

    monkeypatch.setattr(drawing, "draw", draw)
    return things


# What the commands give ----------------------------------------------------------------------------------------------


def test_analyze_prints_a_plan_that_apply_carries_out(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["analyze", "bundled", *FEW, "--criterion", "l1", "--budget", "0.2", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    (tmp_path / "plan.json").write_text(captured.out, encoding="utf-8")
    assert fxprune.Plan.load(tmp_path / "plan.json") == fxprune.Plan.load(tmp_path / "out" / "plan.json")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "report.md", "picture.html"}
    assert [type(thing).__name__ for thing in drawn] == ["Analysis"]

    assert main(["apply", "bundled", str(tmp_path / "plan.json"), "-o", str(tmp_path / "pruned")]) == 0
    captured = capsys.readouterr()
    assert "FLOPs" in captured.out
    assert f"wrote {tmp_path / 'pruned'}" in captured.err
    plan = fxprune.Plan.load(tmp_path / "plan.json")
    expected = fxprune.apply(load_detector(), plan)
    found = fxprune.load(load_detector(), tmp_path / "pruned")
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in found.state_dict().items())


def test_prune_writes_plan_weights_and_report(pruned_folder: Path) -> None:
    names = {path.name for path in pruned_folder.iterdir()}
    assert {"plan.json", "weights.safetensors", "manifest.json", "report.md"} <= names
    assert names <= {"plan.json", "weights.safetensors", "manifest.json", "report.md", "picture.html"}
    assert not [path for path in pruned_folder.parent.iterdir() if path != pruned_folder]
    plan = fxprune.Plan.load(pruned_folder / "plan.json")
    assert plan.after.flops <= 0.9 * plan.before.flops
    assert plan.settings["images"] == 8
    assert plan.removed[0].name in (pruned_folder / "report.md").read_text(encoding="utf-8")
    assert not fxprune.load(load_detector().train(), pruned_folder).training


def test_eval_prints_json_of_the_pruned_model(pruned_folder: Path, capsys: Captured) -> None:
    assert main(["eval", "bundled", "--limit", "16", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(["eval", "bundled", "--limit", "16", "--json", "--pruned", str(pruned_folder)]) == 0
    pruned = json.loads(capsys.readouterr().out)
    assert (whole["model"], whole["images"], pruned["images"]) == ("bundled", 16, 16)
    assert 0.6 < whole["mAP"] < 1
    assert 0.5 < pruned["mAP"] < 1
    assert pruned["mAP"] != whole["mAP"]
    assert whole["mAP_large"] is None
    assert main(["eval", "bundled", "--limit", "16"]) == 0
    captured = capsys.readouterr()
    assert f"{whole['mAP']:.3f}" in captured.out
    assert "no true box" in captured.out
    assert captured.err == ""


def test_sweep_prints_a_point_per_budget_or_the_reason(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    out = tmp_path / "sweep"
    arguments = ["sweep", "bundled", *FEW, "--criterion", "l1", "--budgets", "0.1,0.9", "--out", str(out)]
    for width in (80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(steps, "run_analysis", remembered(steps.run_analysis))
        assert main([*arguments, "--force"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= width
        assert "unpruned" in text
        assert text.count("●") == 2
    found = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    assert {path.name for path in out.iterdir()} == {"sweep.json", "plan-0.1.json", "picture.html"}
    unpruned, tenth, most = found["points"]
    assert unpruned["scores"]["mAP"] > tenth["scores"]["mAP"]
    assert tenth["cost"]["flops"] <= 0.9 * unpruned["cost"]["flops"]
    assert tenth["removed"] == [region.name for region in fxprune.Plan.load(out / "plan-0.1.json").removed]
    assert most["scores"] is None
    assert "cannot be removed" in most["refusal"]
    assert drawn


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the measuring: every region takes a tenth; the backends that were asked for."""
    backends: list[str] = []

    def measure(backend: Any, model: Any, captured: Any, graphs: Any, regions: Any, *_: Any, **__: Any) -> Latency:
        backends.append(next(name for name, known in BACKENDS.items() if known is backend))
        settings = {"device": "cpu", "images": 8, "threads": 1, "rounds": 15, "floor": 0.02}
        return Latency(80.0, {region.name: 8.0 for region in regions}, settings)

    monkeypatch.setattr(analyzer, "measure_latency", measure)
    return backends


@pytest.mark.parametrize(
    ("options", "backends"),
    [
        (["--cost", "latency"], ["eager"]),
        (["--cost", "latency", "--latency-backend", "inductor"], ["inductor"]),
        (["--latency-backend", "eager"], ["eager"]),
        ([], []),
    ],
)
def test_latency_is_measured_when_asked_for(
    options: list[str], backends: list[str], asked: list[str], capsys: Captured
) -> None:
    assert main(["analyze", "bundled", *FEW, "--criterion", "l1", "--json", "--budget", "0.3", *options]) == 0
    plan = fxprune.Plan.from_dict(json.loads(capsys.readouterr().out))
    assert asked == backends
    assert plan.settings.get("latency", {}).get("backend") == (backends[0] if backends else None)
    if "--cost" in options:
        assert (plan.before.latency_ms, plan.after.latency_ms, len(plan.removed)) == (80.0, 56.0, 3)


@pytest.mark.usefixtures("asked")
def test_sweep_over_latency_shows_milliseconds(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--criterion", "l1", "--budgets", "0.1,0.2", "--cost", "latency"]
    assert main(["sweep", "bundled", *FEW, *arguments]) == 0
    text = capsys.readouterr().out
    assert "ms predicted" in text.splitlines()[0]
    assert "72 −10.0%" in text
    assert "64 −20.0%" in text
    assert "80% of the latency" in text


_ANALYSES: list[Any] = []


def remembered(analyzed: Any) -> Any:
    """Analyze once for all widths."""

    def run(*arguments: Any) -> Any:
        if not _ANALYSES:
            _ANALYSES.append(analyzed(*arguments))
        return _ANALYSES[0]

    return run


def test_draw_accepts_plans_and_pruned_models(
    pruned_folder: Path, drawn: list[Any], tmp_path: Path, capsys: Captured
) -> None:
    picture = tmp_path / "picture.svg"
    assert main(["draw", "bundled", str(picture), "--plan", str(pruned_folder / "plan.json")]) == 0
    assert picture.read_text(encoding="utf-8") == "picture"
    assert "--force" in refusal(capsys, "draw", "bundled", picture, "--pruned", pruned_folder)
    assert main(["draw", "bundled", str(picture), "--pruned", str(pruned_folder), "--force"]) == 0
    assert [type(thing).__name__ for thing in drawn] == ["Plan", "SSD"]
    assert list(tmp_path.iterdir()) == [picture]


def test_prune_writes_a_page_of_its_analysis(pruned_folder: Path) -> None:
    page = (pruned_folder / "picture.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "backbone.features.16" in page


@pytest.mark.parametrize("width", [80, 160])
def test_help_fits_the_terminal_and_explains_exit_statuses(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (["--help"], ["prune", "-h"], ["sweep", "--help"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= width
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "130 Ctrl-C" in text
    assert all(name in text for name in ("demo", "analyze", "prune", "apply", "eval", "draw", "sweep", "Examples"))


def test_version_prints_torch_and_device(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"fxprune {fxprune.__version__}, torch {torch.__version__}, ")
    assert len(text.split(", ")[2]) > 2


def test_draw_curve_rises_to_the_right() -> None:
    lines = draw_curve([(0.8, 0.2), (1.0, 0.8)], 60).plain.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0].startswith(" 0.80 ┤")
    marks = [(number, line.index("●")) for number, line in enumerate(lines) if "●" in line]
    assert len(marks) == 2
    assert marks[0][1] > marks[1][1]
    assert "80%" in lines[-1]


# What they refuse ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ("anlyze bundled", 2, "Did you mean 'analyze'"),
        ("analyze", 2, "Missing argument"),
        ("analyze bundled --budget much", 2, "--budget"),
        ("analyze bundled --criterion fish", 2, "known: fisher"),
        ("analyze bundled --cost watts", 2, "known: flops, latency, params, blocks"),
        ("analyze bundled --latency-backend gpu", 2, "known: eager, inductor"),
        ("analyze bundled --limit 0", 2, "--limit"),
        ("analyze torchvision:ssd300_vgg16", 2, "needs images"),
        ("analyze bundled --annotations x.json", 2, "needs the --images"),
        ("analyze bundled --data x.yaml --images y", 2, "--data cannot be combined"),
        ("eval bundled --images .", 2, "mAP needs true boxes"),
        ("sweep bundled --budgets some", 2, "not a list of numbers"),
        ("sweep bundled --budgets 0.1,2", 1, "fraction between 0 and 1"),
        ("prune bundled --budget 2", 1, "fraction between 0 and 1"),
        ("analyze bundled --size 320", 1, "sizes its images itself"),
        ("analyze bundled --device banana", 1, "device 'banana'"),
        ("analyze bundled --classes 3", 1, "has 11 classes"),
        ("apply bundled nothere.json", 1, "nothere.json: No such file"),
        ("eval bundled --pruned nothere", 1, "does not exist"),
    ],
)
def test_wrong_usage_exits_with_two(arguments: str, status: int, text: str, capsys: Captured) -> None:
    assert text in refusal(capsys, *arguments.split(), status=status)


def test_apply_refuses_bad_plans_and_plans_of_other_models(
    pruned_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "plan.json").write_text('{"images": [', encoding="utf-8")
    assert "not a JSON file" in refusal(capsys, "apply", "bundled", tmp_path / "plan.json")
    other = "torchvision:ssdlite320_mobilenet_v3_large"
    assert "the structure differs" in refusal(capsys, "apply", other, pruned_folder / "plan.json")


def test_third_party_warnings_are_shown_on_demand(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def warned(*_: Any) -> Any:
        warnings.warn("old and rusty", UserWarning, stacklevel=1)
        raise fxprune.ModelError("gone")

    monkeypatch.setattr(steps, "open_model", warned)
    assert refusal(capsys, "eval", "bundled") == "fxprune: ModelError: gone"
    assert main(["eval", "bundled", "--debug"]) == 1
    assert "old and rusty" in capsys.readouterr().err


def test_unexpected_error_is_one_line_and_a_traceback_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a wheel\ncame off")

    monkeypatch.setattr(steps, "open_model", broken)
    text = refusal(capsys, "eval", "bundled")
    assert all(word in text for word in ("RuntimeError", "a wheel came off", "--debug"))
    assert main(["eval", "bundled", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
