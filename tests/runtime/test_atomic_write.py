"""`atomic_write`: whatever stops the writing or the move, the earlier file stays and no other is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxprune import StorageError
from fxprune.runtime.atomic_write import atomic_write


def write_file(place: Path, text: str) -> None:
    with atomic_write(place) as draft:
        draft.write_text(text)


def write_folder(place: Path, text: str) -> None:
    with atomic_write(place) as draft:
        (draft / "inner").mkdir(parents=True)
        (draft / "inner" / "letter").write_text(text)


def contents(folder: Path) -> dict[str, str | None]:
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in folder.rglob("*")}


WRITERS = [write_file, write_folder]
Writer = Callable[[Path, str], None]


@pytest.mark.parametrize("write", WRITERS)
def test_atomic_write_creates_and_replaces(write: Writer, tmp_path: Path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "above" / "place", text)
    write(tmp_path / "expected" / "place", "new")
    assert contents(tmp_path / "above") == contents(tmp_path / "expected")


STEPS: list[tuple[Writer, Any, str]] = [
    *((write, owner, name) for write in WRITERS for owner, name in ((Path, "write_text"), (os, "fsync"))),
    *((write, Path, "replace") for write in WRITERS),
    (write_folder, Path, "rename"),
]


@pytest.mark.parametrize(("write", "owner", "name"), STEPS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), OSError(28, "No space left on device")])
def test_stopped_atomic_write_leaves_the_place_unchanged(
    write: Writer, owner: Any, name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        monkeypatch.undo()  # what tidies up works
        raise error

    write(tmp_path / "place", "old")
    before = contents(tmp_path)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)) as caught:
        write(tmp_path / "place", "new")
    assert contents(tmp_path) == before
    if isinstance(error, OSError):
        assert all(word in str(caught.value) for word in ("place", "No space left", "check its folder"))


def test_atomic_write_does_not_replace_a_file_by_a_folder(tmp_path: Path) -> None:
    write_file(tmp_path / "file", "old")
    write_folder(tmp_path / "folder", "old")
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for write, name in ((write_folder, "file"), (write_file, "folder"), (write_file, "empty")):
        with pytest.raises(StorageError, match=f"{name} cannot be written"):
            write(tmp_path / name, "new")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("write", WRITERS)
def test_atomic_write_syncs_before_the_move(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    flush, move = os.fsync, Path.replace

    def flushed(file: int) -> None:
        steps.append(os.fstat(file).st_size)
        flush(file)

    def moved(draft: Path, place: Path) -> Path:
        steps.append("move")
        return move(draft, place)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", moved)
    write(tmp_path / "place", "seven b")
    assert steps == [7, "move"]
