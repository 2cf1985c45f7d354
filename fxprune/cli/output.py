"""Writes output files and folders completely or not at all; earlier ones are replaced only with --force."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from fxprune.errors import StorageError
from fxprune.reporting.report import Report
from fxprune.runtime.atomic_write import atomic_write
from fxprune.runtime.json_text import first_few

REPORT, PICTURE = "report.md", "picture.html"
_WRITTEN_NAMES = re.compile(r"(plan(-[0-9.]+)?|manifest|sweep)\.json|weights\.safetensors|report\.md|picture\.html")


def check_folder(folder: Path | None, force: bool) -> None:
    """Reject a folder that cannot be written, before the work starts.

    Raises
    ------
    StorageError
        If the folder exists and `force` is False; if it is a file, or holds anything that fxprune did not write.
    """
    if folder is None or not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.resolve() == Path.cwd():
        raise StorageError(f"{folder} is {'the current folder' if folder.is_dir() else 'a file'}; name another folder")
    names = sorted(path.name for path in folder.iterdir())
    if strangers := [name for name in names if not _WRITTEN_NAMES.fullmatch(name)]:
        raise StorageError(f"{folder} holds {first_few(strangers)}, which fxprune did not write; name another folder")
    if names and not force:
        raise StorageError(f"{folder} exists already; --force replaces it")


def check_file(path: Path, force: bool) -> None:
    """Reject a path that is a folder, or a file that exists if `force` is False."""
    if path.is_dir():
        raise StorageError(f"{path} is a folder; name a file")
    if os.path.lexists(path) and not force:
        raise StorageError(f"{path} exists already; --force replaces it")


def write_folder(folder: Path, force: bool, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder, then move it to its final path.

    Parameters
    ----------
    folder : Path
        The final path; missing parent folders are created.
    force : bool
        Whether to replace the output of an earlier run.
    fill : callable
        ``fill(draft)`` writes the files into an empty folder.

    Raises
    ------
    StorageError
        As in `check_folder`, or if the folder cannot be written. After any error, the path is unchanged.
    """
    check_folder(folder, force)
    with atomic_write(Path(os.path.realpath(folder))) as draft:
        draft.mkdir()
        fill(draft)


def write_report(report: Report, path: Path) -> None:
    """Write a report as Markdown."""
    path.write_text(report.to_markdown(), encoding="utf-8")
