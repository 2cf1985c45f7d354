"""The manifest of a saved model: sizes and digests of its files, and facts that plans and weights do not contain."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fxprune.errors import StorageError
from fxprune.planning.plan_schema import read_record

FORMAT = 1
"""Version of the folder's layout. Other versions cannot be read."""
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"
_SAVED_NAMES = re.compile(rf"{re.escape(NAME)}|{re.escape(WEIGHTS)}|plan(-[1-9]\d*)?\.json")
_DAMAGED_HINT = (
    "it is damaged or was edited; copy the whole folder again from where it was saved, or save the model again"
)


@dataclass(frozen=True)
class Entry:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Entry:
        """Return the entry for the content of a file."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes
    ----------
    fxprune, torch : str
        Versions of the libraries that wrote the folder.
    network : str
        Class name of the network. Only error messages use it.
    dtype : tuple of str
        Floating-point types of the weights and buffers, for example ``("float16",)``.
    training : bool
        Whether the network was in train mode.
    exceptions : tuple of str
        Paths of the modules in the other mode.
    channels_last : tuple of str
        Keys of the weights with memory format channels last. In the file they are contiguous.
    tied : mapping of str to str
        For each key that shares its tensor with an earlier key: the earlier key. The file contains only this one.
    files : mapping of str to Entry
        Size and digest of every other file of the folder, by name.
    """

    fxprune: str
    torch: str
    network: str
    dtype: tuple[str, ...]
    training: bool
    exceptions: tuple[str, ...]
    channels_last: tuple[str, ...]
    tied: Mapping[str, str]
    files: Mapping[str, Entry]

    @property
    def plans(self) -> list[str]:
        """Names of the plan files, in the order in which the plans were applied."""
        return plan_names(len(self.files) - 1)

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON that includes a digest of itself."""
        data = {"fxprune_save": FORMAT, **asdict(self)}
        return (json.dumps({**data, "sha256": _digest(data)}, indent=1) + "\n").encode()


def plan_names(count: int) -> list[str]:
    """Return the names of a number of plan files, the first applied plan first.

    Examples
    --------
    >>> plan_names(1), plan_names(2)
    (['plan.json'], ['plan-1.json', 'plan-2.json'])
    """
    return ["plan.json"] if count == 1 else [f"plan-{index}.json" for index in range(1, count + 1)]


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder.

    Raises
    ------
    StorageError
        If the folder or the manifest does not exist, or the manifest is damaged, of another version, or lists
        unexpected files.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise StorageError(f"{folder} {what}; give the folder that fxprune.save wrote")
    path = _join_checked(folder, NAME)
    if not path.is_file():
        raise StorageError(f"{folder} holds no {NAME}; give the folder that fxprune.save wrote, with all its files")
    return _check(path, parse_json(path, _read(path)))


def _check(path: Path, data: Any) -> Manifest:
    """Check version, fields, file names and digest of a manifest."""
    if not isinstance(data, dict) or "fxprune_save" not in data:
        raise StorageError(f"{path}: this is no manifest of fxprune.save: it has no field 'fxprune_save'")
    if data["fxprune_save"] != FORMAT:
        raise StorageError(
            f"{path}: the folder has format {data['fxprune_save']!r}, this fxprune reads {FORMAT}; load it with"
            f" the fxprune that wrote it ({data.get('fxprune', 'unknown')})"
        )

    def fail(text: str) -> StorageError:
        return StorageError(f"{path}: {text}; {_DAMAGED_HINT}")

    rest = {key: value for key, value in data.items() if key not in ("fxprune_save", "sha256")}
    if isinstance(files := data.get("files"), dict):
        entries = {name: read_record(Entry, entry, f"files.{name}", fail) for name, entry in files.items()}
        rest["files"] = entries
    manifest: Manifest = read_record(Manifest, rest, "manifest", fail)
    if not isinstance(files, dict):
        raise fail(f"field 'files' should be an object, is {files!r}")
    _check_names(path, set(files))
    if data.get("sha256") != _digest({key: value for key, value in data.items() if key != "sha256"}):
        raise StorageError(f"{path}: does not have the digest it names; {_DAMAGED_HINT}")
    return manifest


def _check_names(path: Path, names: set[str]) -> None:
    """Raise an error if a file is outside of the folder, or the names are not those of a saved model."""
    for name in sorted(names):
        if name in (".", "..") or not name == PurePosixPath(name).name == PureWindowsPath(name).name:
            raise StorageError(f"{path}: the file name {name!r} leads out of the folder; do not trust this folder")
    expected = {WEIGHTS, *plan_names(max(1, len(names) - 1))}
    if names != expected:
        raise StorageError(f"{path}: lists the files {sorted(names)}, expected {sorted(expected)}; {_DAMAGED_HINT}")


def read_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read the files that a manifest lists and check their sizes and digests.

    Returns
    -------
    dict of str to bytes
        Content by file name.

    Raises
    ------
    StorageError
        If a file is missing, is a link to outside of the folder, or has another size or digest. The message names it.
    """
    contents = {}
    for name, entry in manifest.files.items():
        path = _join_checked(folder, name)
        if not path.is_file():
            raise StorageError(f"{path} is missing; {NAME} lists it: copy the whole folder again, or save again")
        if path.stat().st_size != entry.size:
            raise StorageError(f"{path} has {path.stat().st_size} bytes, {NAME} says {entry.size}: {_DAMAGED_HINT}")
        contents[name] = _read(path)
        if Entry.of(contents[name]) != entry:
            raise StorageError(f"{path} does not have the SHA-256 that {NAME} names: {_DAMAGED_HINT}")
    return contents


def parse_json(path: Path, content: bytes) -> Any:
    """Parse JSON; if this fails, raise a `StorageError` with the path of the file."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not a JSON file ({error}); {_DAMAGED_HINT}") from error


def unknown_files(folder: Path) -> list[str]:
    """Return the names of a folder's entries that are not files of a saved model; all names if it has no manifest."""
    names = sorted(path.name for path in folder.iterdir())
    try:
        data = parse_json(folder / NAME, _read(folder / NAME))
    except StorageError:
        return names
    if not isinstance(data, dict) or "fxprune_save" not in data:
        return names
    return [name for name in names if not _SAVED_NAMES.fullmatch(name) or not (folder / name).is_file()]


def _join_checked(folder: Path, name: str) -> Path:
    """Join a folder and a file name; raise a `StorageError` if the file is a link to outside of the folder."""
    path = folder / name
    if Path(os.path.realpath(path)).parent != Path(os.path.realpath(folder)):
        raise StorageError(f"{path} is a link out of the folder; put the file itself there")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error}); check its permissions") from error
