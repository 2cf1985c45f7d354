"""`load` refuses damaged folders and models that do not fit, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import ModelError, PlanError, SettingError, StorageError
from fxprune.deploy import manifest
from tests.helpers.hostile import assert_refused, changed
from tests.helpers.models import Eager, labelled, pixels, tiny

X = pixels(2, 3, 16, 16, seed=9)


@pytest.fixture
def folder(pruned_eager: Any, tmp_path: Path) -> Path:
    fxprune.save(pruned_eager, tmp_path / "saved")
    return tmp_path / "saved"


def read(folder: Path) -> Any:
    return json.loads((folder / manifest.NAME).read_text())


def seal(folder: Path, data: Any, measure: bool = True) -> None:
    """Write a manifest with a valid digest, and valid digests of the files as they are now."""
    for name in data["files"] if measure else ():
        entry = manifest.Entry.of((folder / name).read_bytes())
        data["files"][name] = {"size": entry.size, "sha256": entry.sha256}
    data.pop("sha256", None)
    (folder / manifest.NAME).write_text(json.dumps({**data, "sha256": manifest._digest(data)}))


def assert_load_refused(folder: Any, error: type[Exception], match: str, model: nn.Module | None = None) -> None:
    model = model or Eager()
    with assert_refused(model, error, match):
        fxprune.load(model, folder)


FILES = ("manifest.json", "plan.json", "weights.safetensors")


# Files that are not what was saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_load_refuses_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_load_refused(folder, StorageError, rf"holds no {name}|{name} is missing; manifest.json lists it")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_load_refuses_a_truncated_file(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: min(int(share * len(content)), len(content) - 2)])
    assert_load_refused(folder, StorageError, rf"{name}.*(not a JSON file|bytes, manifest.json says).*(copy|save)")


@pytest.mark.parametrize("name", FILES)
def test_load_refuses_any_flipped_bit(folder: Path, name: str) -> None:
    model, path = Eager(), folder / name
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 700)):
        harmed = bytearray(content)
        harmed[position] ^= 1 << position % 8
        path.write_bytes(harmed)
        with pytest.raises(StorageError, match=r"saved"):
            fxprune.load(model, folder)
    path.write_bytes(content)
    fxprune.load(model, folder)


def test_load_refuses_bytes_that_are_no_safetensors(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"\x80\x04" + b"x" * 100)
    assert_load_refused(folder, StorageError, r"weights.safetensors has 102 bytes, manifest.json says \d+")
    seal(folder, read(folder))
    assert_load_refused(folder, StorageError, r"weights.safetensors: not a safetensors file")


def test_load_refuses_weights_of_another_model(folder: Path, tmp_path: Path) -> None:
    fxprune.save(fxprune.compile(tiny(), labelled(), criterion="l1"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "weights.safetensors", folder)
    assert_load_refused(folder, StorageError, r"weights.safetensors has \d+ bytes|does not have the SHA-256")
    seal(folder, read(folder))
    assert_load_refused(
        folder, StorageError, r"'weight' is missing in the file, 'shift' is missing .* more.*saved from a Eager"
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda plan: changed(plan, "islands[0].fingerprint", "0" * 16),
            r"fingerprint .*structure differs",
        ),
        (
            lambda plan: changed(plan, "islands[0].name", "head"),
            r"\['body'\] .*not list",
        ),
        (lambda plan: changed(plan, "extra", 1), r"unknown \['extra'\]"),
        (lambda plan: changed(plan, "fxprune_plan", 99), r"schema version 99"),
        (lambda plan: changed(plan, "regions", ...), r"'regions' should be a list"),
        (
            lambda plan: {**plan, "regions": [row | {"exit": "nowhere"} for row in plan["regions"]]},
            r"'nowhere', which is no node",
        ),
    ],
)
def test_load_refuses_an_edited_plan(folder: Path, change: Callable[[Any], Any], match: str) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(change(plan)))
    assert_load_refused(folder, StorageError, r"plan.json has \d+ bytes, manifest.json says|SHA-256")
    seal(folder, read(folder))
    assert_load_refused(folder, PlanError, rf"plan\.json: .*{match}")


def test_load_refuses_a_plan_that_removes_less_than_the_weights_lack(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    for row in plan["regions"]:
        row["removed"] = False
    (folder / "plan.json").write_text(json.dumps(plan))
    seal(folder, read(folder))
    assert_load_refused(folder, StorageError, r"'body\..*' is missing in the file")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a JSON file"),
        (b"\xff\xfe{}", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"9" * 10_000, "not a JSON file"),
        (b"[]", "no field 'fxprune_save'"),
        (b'{"files": {}}', "no field 'fxprune_save'"),
        (b'{"fxprune_save": 2, "fxprune": "9.1"}', r"format 2, .*reads 1.*9\.1"),
        (b'{"fxprune_save": 1}', "lacks .'channels_last'"),
    ],
)
def test_load_refuses_another_manifest(folder: Path, content: bytes, match: str) -> None:
    (folder / manifest.NAME).write_bytes(content)
    assert_load_refused(folder, StorageError, rf"manifest\.json: .*{match}")


@pytest.mark.parametrize("field", sorted(field.name for field in dataclasses.fields(manifest.Manifest)))
@pytest.mark.parametrize("value", [None, 1, [1], {"a": 1}])
def test_load_refuses_a_field_of_the_wrong_type(folder: Path, field: str, value: Any) -> None:
    seal(folder, {**read(folder), field: value}, measure=False)
    assert_load_refused(folder, StorageError, rf"manifest\.json: field '(manifest\.)?{field}(\.a)?' should be")


def test_load_refuses_unknown_and_edited_fields(folder: Path) -> None:
    data = read(folder)
    seal(folder, {**data, "pickle": "x"})
    assert_load_refused(folder, StorageError, r"manifest\.json: .* has unknown \['pickle'\]")
    (folder / manifest.NAME).write_text(json.dumps({**data, "training": True}))
    assert_load_refused(folder, StorageError, r"manifest\.json: does not have the digest it names")
    seal(folder, {**data, "tied": {"shift": "nothing"}})
    assert_load_refused(folder, StorageError, r"weights\.safetensors: lacks nothing, which manifest\.json names")


@pytest.mark.parametrize(
    "name", ["../plan.json", "/etc/passwd", "a/plan.json", "..\\plan.json", "C:plan.json", ".", "..", "a/../plan.json"]
)
def test_load_refuses_a_path_out_of_the_folder(folder: Path, name: str) -> None:
    shutil.copy(folder / "plan.json", folder.parent)
    data = read(folder)
    data["files"][name] = data["files"].pop("plan.json")
    seal(folder, data, measure=False)
    assert_load_refused(folder, StorageError, r"manifest\.json: the file name .* leads out of the folder")


@pytest.mark.parametrize("names", [["plan-2.json"], [], ["plan.json", "notes.txt"], ["plan.json", "plan-1.json"], [""]])
def test_load_refuses_a_list_of_other_files(folder: Path, names: list[str]) -> None:
    data = read(folder)
    entry = data["files"].pop("plan.json")
    seal(folder, {**data, "files": data["files"] | dict.fromkeys(names, entry)}, measure=False)
    assert_load_refused(folder, StorageError, r"manifest\.json: lists the files .* expected")


@pytest.mark.parametrize("name", FILES)
def test_load_refuses_links(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert_load_refused(folder, StorageError, rf"{name} is a link out of the folder")
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert_load_refused(folder, StorageError, rf"holds no {name}|{name} is missing")
    (folder / name).unlink()
    (folder / name).mkdir()
    assert_load_refused(folder, StorageError, rf"holds no {name}|{name} is missing")


def test_load_accepts_a_link_to_the_folder(folder: Path, pruned_eager: Any) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert torch.equal(fxprune.load(Eager(), link)(X), pruned_eager(X))
    fxprune.save(pruned_eager, link, overwrite=True)
    assert link.is_symlink()


def test_load_refuses_an_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "plan.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert_load_refused(folder, StorageError, r"plan\.json cannot be read .*permissions")


def test_load_refuses_a_path_that_is_no_folder(folder: Path) -> None:
    assert_load_refused(folder / "plan.json", StorageError, r"plan\.json is a file, not a folder")
    assert_load_refused(
        folder / "nowhere", StorageError, r"nowhere does not exist; give the folder that fxprune\.save wrote"
    )
    assert_load_refused(folder.parent, StorageError, r"holds no manifest\.json")
    for thing in (3, None, b"saved", "a\0b"):
        assert_load_refused(thing, SettingError, r"folder is .*; give a path")


# Models that are not what was saved ----------------------------------------------------------------------------------


def test_load_refuses_models_that_do_not_fit(folder: Path, pruned_eager: Any) -> None:
    assert_load_refused(
        folder, StorageError, r"'weight' is \(5, 8\) .*in the file and \(7, 8\).*as many classes", Eager(7)
    )
    assert_load_refused(folder, StorageError, r"'shift' is not in the model", Eager(shift=False))
    assert_load_refused(folder, PlanError, r"plan\.json: the plan needs island 'body'.*saved from a Eager", tiny())
    assert_load_refused(folder, ModelError, r"was pruned already; load takes the model as it was built", pruned_eager)
    assert_load_refused(folder, ModelError, r"wrapped in DataParallel", nn.DataParallel(Eager()))
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        fxprune.load("yolov8n.pt", folder)  # type: ignore[arg-type]
    wrong: Any = Eager()
    wrong.weight = nn.Parameter(torch.ones(5, 8, dtype=torch.int64), requires_grad=False)
    assert_load_refused(
        folder, StorageError, r"'weight' is \(5, 8\) floating in the file and \(5, 8\) torch\.int64", wrong
    )
