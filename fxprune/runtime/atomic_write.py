"""Writes a file or a folder completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from fxprune.errors import StorageError


@contextmanager
def atomic_write(place: Path) -> Iterator[Path]:
    """Write to a draft in the same folder, and move the draft to its place when it is complete and on the disk.

    Parent folders are created. A file replaces an existing file, and a folder replaces an existing folder.

    Parameters
    ----------
    place : Path
        Path of the file or folder; not a link.

    Yields
    ------
    Path
        Path of the draft, which does not exist yet.

    Raises
    ------
    StorageError
        If the file or folder cannot be written. After any error the place is unchanged and no draft is left.

    Examples
    --------
    >>> with atomic_write(Path("letter.txt")) as draft:                 # doctest: +SKIP
    ...     draft.write_text("whole")
    """
    draft = place.with_name(f".fxprune-{uuid4().hex[:12]}")
    old = draft.with_name(f"{draft.name}-old")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        _flush(draft)
        if draft.is_dir() and place.is_dir():
            place.rename(old)
        draft.replace(place)
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"{place} cannot be written ({reason}); check its folder, its permissions and the disk"
        ) from error
    finally:
        if old.exists() and not place.exists():
            old.rename(place)
        for left in (draft, old):
            shutil.rmtree(left, ignore_errors=True)
            if left.is_file():
                left.unlink()


def _flush(draft: Path) -> None:
    """Wait until every file is on the disk."""
    for path in (draft, *draft.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
