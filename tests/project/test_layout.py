"""Where files are: few modules at the top of the package, wings of a readable size, tests that share only helpers."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxprune
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "fxprune"
TESTS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks" / "tests").rglob("*.py")])
WINGS = sorted(found.name for found in pkgutil.walk_packages(fxprune.__path__, "fxprune.") if found.ispkg)
PATCHING = {"setattr", "delattr", "patch"}


def is_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(re.match(r"\w+\.\w", node.value))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Names of imported modules; for ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def patches_by_path(tree: ast.AST) -> list[int]:
    """Lines that patch an attribute by a dotted string such as ``"fxprune.errors.name"``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args and is_path(node.args[0])]
    return [call.lineno for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in PATCHING]


def test_top_of_the_package_has_at_most_four_modules() -> None:
    names = {path.name for path in PACKAGE.glob("*.py")} - {"bundled.py"}
    assert len(names) <= 4, names


@pytest.mark.parametrize("wing", WINGS)
def test_wing_has_two_to_ten_modules_and_a_docstring_of_two_to_five_sentences(wing: str) -> None:
    module = importlib.import_module(wing)
    modules = {path.name for path in Path(module.__path__[0]).glob("*.py")} - {"__init__.py"}
    assert 2 <= len(modules) <= 10, modules
    sentences = re.findall(r"[.!?](?:\s+(?!Output:)|$)", module.__doc__ or "")  # "Input: ... Output: ..." counts as one
    assert 2 <= len(sentences) <= 5, module.__doc__


def test_folders_of_tests_are_named_after_wings() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    assert folders - {"helpers", "project"} <= {wing.removeprefix("fxprune.") for wing in WINGS}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tests_import_no_test_and_no_benchmark_and_patch_objects(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set(imported_modules(tree))
    assert not [name for name in names if name.startswith(("tests.", "benchmarks.")) and ".test_" in name]
    if path.is_relative_to(ROOT / "tests"):
        assert not [name for name in names if name.split(".")[0] == "benchmarks"]
    assert patches_by_path(tree) == []
