"""Linters, type checks and import layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "import-linter": ["lint-imports"],
}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_linters_find_nothing(name: str) -> None:
    command, *arguments = CHECKS[name]
    done = subprocess.run(
        [str(Path(sys.executable).parent / command), *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_and_functions_are_short() -> None:
    long = []
    for folder in ("fxprune", "passes", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if text.count("\n") > 400:
                long.append(str(path))
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and (node.end_lineno or node.lineno) - node.lineno + 1 > 60:
                    long.append(f"{path}:{node.lineno} {node.name}")
    assert long == []
