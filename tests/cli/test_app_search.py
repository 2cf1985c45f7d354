"""Search and healing on the command line: files, messages, and Ctrl-C."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fxprune
from fxprune.cli.app import main
from fxprune.cli.calibration_images import open_images
from fxprune.cli.options import DataOptions, PruneOptions
from fxprune.cli.steps import describe_effort
from fxprune.cli.terminal import Terminal
from fxprune.demo.bundled import load_detector
from fxprune.healing.loss_change import LossChange
from fxprune.healing.methods import METHODS
from fxprune.search.judges import DetectionAgreement
from fxprune.search.plan_search import STRATEGIES
from tests.helpers.commands import FEW, VAL, Captured, refusal

PRUNE = ("prune", "bundled", *FEW, "--budget", "0.2")


def notes(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = fxprune.report(fxprune.load(load_detector(), folder)).to_dict()["settings"]
    return settings


def test_prune_with_search_announces_heals_and_saves(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main([*PRUNE, "--strategy", "search", "--tries", "2", "--heal", "affine", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("search: scores 8 images twice")
    assert "search: 2 plans tried" in captured.out
    found = notes(out)
    assert (found["strategy"], found["tried"], found["heal"]["method"]) == ("search", 2, "affine")
    assert "### Healed" in (out / "report.md").read_text(encoding="utf-8")
    assert "<html" in (out / "picture.html").read_text(encoding="utf-8")


def test_search_with_fitted_plans_scores_twice(capsys: Captured) -> None:
    assert main([*PRUNE, "--strategy", "search", "--tries", "1", "--heal", "affine"]) == 0
    assert capsys.readouterr().err.startswith("search: scores 8 images twice")


def test_prune_can_heal_with_labels(capsys: Captured) -> None:
    assert main([*PRUNE, "--criterion", "l1", "--heal", "mimic_labelled", "--steps", "2", "--json"]) == 0
    heal = json.loads(capsys.readouterr().out)["settings"]["heal"]
    assert (heal["method"], heal["labels"], heal["steps"]) == ("mimic_labelled", True, 2)


def test_prune_with_labels_refuses_images_alone(capsys: Captured) -> None:
    told = refusal(capsys, "prune", "bundled", "--images", VAL / "images", *FEW, "--heal", "mimic_labelled")
    assert "batch 0 has no labels" in told


def test_prune_without_search_can_heal_by_mimic(capsys: Captured) -> None:
    assert main([*PRUNE, "--criterion", "l1", "--heal", "mimic", "--steps", "2", "--json"]) == 0
    captured = capsys.readouterr()
    heal = json.loads(captured.out)["settings"]["heal"]
    assert (heal["method"], heal["steps"], heal["images"]) == ("mimic", 2, 8)
    assert heal["distance"]["before"] > 0
    assert heal["loss"]["after"] <= heal["loss"]["before"]
    told, unsaved = captured.err.splitlines()
    assert told.startswith("note: after healing")
    assert "nothing was saved" in unsaved
    assert "--out" in unsaved


@pytest.mark.slow
def test_sweep_heals_its_points(capsys: Captured) -> None:
    arguments = ["sweep", "bundled", *FEW, "--budgets", "0.3", "--json"]
    found = []
    for method in ("none", "affine"):
        assert main([*arguments, "--heal", method]) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, healed = found
    assert (plain["heal"], healed["heal"]) == ("none", "affine")
    assert plain["points"][1]["removed"] == healed["points"][1]["removed"]
    assert plain["points"][0]["scores"] == healed["points"][0]["scores"]
    assert plain["points"][1]["scores"] != healed["points"][1]["scores"]


@pytest.mark.parametrize(("chosen", "said"), [([], "--heal affine."), (["--heal", "none"], None)])
def test_sweep_names_the_healing_of_its_points(chosen: list[str], said: str | None, capsys: Captured) -> None:
    assert main(["sweep", "bundled", *FEW, "--budgets", "0.1", *chosen]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "healed" in line] == (
        [f"Every pruned model was healed: {said}"] if said else []
    )


@pytest.mark.parametrize("command", ["sweep", "prune"])
def test_prune_notes_the_loss_after_healing_and_sweep_does_not(command: str, capsys: Captured, tmp_path: Path) -> None:
    measured = {"sweep": ["--budgets", "0.5"], "prune": ["--budget", "0.5", "--out", str(tmp_path / "out")]}[command]
    assert main([command, "bundled", *FEW, *measured]) == 0
    assert ("after healing, the loss" in capsys.readouterr().err) == (command == "prune")


# Ctrl-C --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the second plan is judged."""
    judged: list[Any] = []
    for kind in (LossChange, DetectionAgreement):
        monkeypatch.setattr(kind, "increase", _stopping(kind.increase, judged))


def _stopping(worse: Any, judged: list[Any]) -> Any:
    def stop(self: Any, pruned: Any) -> Any:
        judged.append(pruned)
        if len(judged) == 2:
            raise KeyboardInterrupt
        return worse(self, pruned)

    return stop


@pytest.mark.usefixtures("interrupted")
@pytest.mark.filterwarnings("default::fxprune.FxpruneWarning")
def test_ctrl_c_saves_the_best_so_far(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main([*PRUNE, "--strategy", "search", "--tries", "5", "--criterion", "l1", "--out", str(out)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "interrupted after 1 of 5" in said
    assert said.endswith(f"fxprune: wrote {out}")
    assert (notes(out)["strategy"], notes(out)["prunings"]) == ("search", 1)


@pytest.mark.usefixtures("interrupted")
@pytest.mark.filterwarnings("default::fxprune.FxpruneWarning")
def test_second_ctrl_c_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "mimic", stop)
    out = tmp_path / "out"
    assert main([*PRUNE, "--strategy", "search", "--criterion", "l1", "--heal", "mimic", "--out", str(out)]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "fxprune: interrupted"
    assert not list(tmp_path.iterdir())


# Images, effort, options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heal", "limit", "count"), [("none", None, 64), ("affine", None, 200), ("mimic", 9, 9)])
def test_prune_with_healing_reads_more_images(heal: str, limit: int | None, count: int) -> None:
    options = DataOptions(images=VAL / "images", limit=limit)
    assert len(open_images(load_detector(), options, "calibration", heal).dataset) == count


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (PruneOptions("one_shot", heal="mimic"), ""),
        (PruneOptions("search", 24, "none"), "24 plans: 25 forward passes over 192"),
        (
            PruneOptions("search", 3, "mimic"),
            "3 plans: 12 forward passes over 64",
        ),
    ],
)
def test_describe_effort_tells_tries_and_steps(search: PruneOptions, said: str) -> None:
    found = describe_effort(200, search)
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.parametrize(("option", "value"), [("--strategy", "greedy"), ("--heal", "norms"), ("--shapes", "sampled")])
def test_removed_names_are_refused_with_their_replacement(option: str, value: str, capsys: Captured) -> None:
    assert "is gone: " in refusal(capsys, "prune", "bundled", option, value, status=2)


@pytest.mark.parametrize("option", ["--strategy", "--heal"])
def test_unknown_names_are_refused(option: str, capsys: Captured) -> None:
    known = STRATEGIES if option == "--strategy" else METHODS
    text = refusal(capsys, "prune", "bundled", option, "luck", status=2)
    assert f"'luck' is not known; known: {', '.join(known)}" in text


# Progress ------------------------------------------------------------------------------------------------------------


def frames(*told: tuple[str, int, int | None]) -> str:
    """What a terminal is sent of the bars, the last frame as it is after what was told."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=80)
    with Terminal(console, console).progress() as tell:
        for stage, done, total in told:
            tell(stage, done, total)
    return file.getvalue()


ROUND: list[tuple[str, int, int | None]] = [("capture", 0, 1), ("capture", 1, 1)]
ROUND += [("attribution", 0, 16), ("attribution", 8, 16), ("attribution", 16, 16)]


def test_progress_of_a_repeated_stage_continues() -> None:
    assert "32/32 img" in frames(*ROUND, *ROUND)


def test_progress_of_a_stage_of_unknown_length_ends_full() -> None:
    told = [("affine", 1, None), ("affine", 2, None)]
    assert "layers" not in frames(*told)
    assert "2/2 layers" in frames(*told, ("mimic", 1, 4))
    assert "1/4 steps" in frames(*told, ("mimic", 1, 4))


def test_progress_of_one_analysis_counts_images() -> None:
    assert "16/16 img" in frames(*ROUND)
