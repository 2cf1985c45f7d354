"""The map in ``benchmarks/README.md`` is complete."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))


def test_readme_names_every_results_file() -> None:
    files = [path.name for path in (FOLDER / "results").iterdir()]
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in NAMED)] == []


def test_readme_names_every_command() -> None:
    modules = {
        ".".join(path.relative_to(FOLDER).with_suffix("").parts)
        for path in FOLDER.rglob("*.py")
        if re.search("^if __name__", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    commands = {name.split()[0] for name in NAMED}
    assert modules - commands == set()
