"""Arguments, folders and error text for tests of the command line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from fxprune.cli.app import main

VAL = Path(str(resources.files("fxprune.demo") / "data" / "val"))
FEW = ("--limit", "8", "--batch", "8")
Captured = pytest.CaptureFixture[str]


def refusal(capsys: Captured, *arguments: object, status: int = 1) -> str:
    """Run what must fail, and return its one paragraph on stderr with its line breaks taken out."""
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.replace("│", " ").split())
