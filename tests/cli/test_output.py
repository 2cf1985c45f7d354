"""Output of the commands: nothing is replaced without --force, and errors keep earlier files."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxprune.cli import output, steps
from fxprune.cli.app import main
from tests.helpers.commands import Captured, refusal


def test_output_is_not_overwritten_without_force(pruned_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    before = {path: path.read_bytes() for path in pruned_folder.iterdir()}
    assert "--force replaces it" in refusal(capsys, "prune", "bundled", "--out", pruned_folder)
    assert "exists already" in refusal(capsys, "apply", "bundled", pruned_folder / "plan.json", "-o", pruned_folder)
    (tmp_path / "letter.txt").write_text("mine", encoding="utf-8")
    assert "letter.txt" in refusal(capsys, "prune", "bundled", "--out", tmp_path, "--force")
    assert "is a file" in refusal(capsys, "prune", "bundled", "--out", tmp_path / "letter.txt", "--force")
    assert "cannot be written" in refusal(
        capsys, "apply", "bundled", pruned_folder / "plan.json", "--out", tmp_path / "letter.txt" / "out"
    )
    assert {path: path.read_bytes() for path in pruned_folder.iterdir()} == before
    assert (tmp_path / "letter.txt").read_text(encoding="utf-8") == "mine"


def test_force_replaces_an_earlier_run_completely(pruned_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more in ([], ["--force"]):
        assert main(["apply", "bundled", str(pruned_folder / "plan.json"), "--out", str(out), *more]) == 0
    assert list(tmp_path.iterdir()) == [out]


def test_full_disk_keeps_the_earlier_run(
    pruned_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    out = tmp_path / "out"
    assert main(["apply", "bundled", str(pruned_folder / "plan.json"), "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(steps, "write_report", full)
    text = refusal(capsys, "apply", "bundled", pruned_folder / "plan.json", "--out", out, "--force")
    assert "No space left" in text
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_full_disk_behind_stdout_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    assert "stdout: No space left" in refusal(capsys, "eval", "bundled", "--limit", "4")
    full.close()  # what it did not take is let go of


def test_interruption_while_moving_restores_the_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    output.write_folder(out, False, writing("old"))

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            output.write_folder(out, True, writing("new"))
    assert (out / "plan.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def writing(text: str) -> Callable[[Path], None]:
    def fill(draft: Path) -> None:
        (draft / "plan.json").write_text(text, encoding="utf-8")

    return fill
