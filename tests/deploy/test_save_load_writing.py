"""`save` refuses what it cannot write or must not replace, and an interruption leaves no files."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import ModelError, SettingError, StorageError
from fxprune.deploy import weights
from fxprune.rewriting.history import compare_inventory, take_inventory
from tests.helpers.hostile import assert_refused, assert_unchanged
from tests.helpers.models import Eager, labelled, pixels, squared, tiny

X = pixels(2, 3, 16, 16, seed=9)


@pytest.fixture
def pruned(pruned_eager: Any) -> Any:
    return copy.deepcopy(pruned_eager)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Hold a block to leave every file and folder below one as it was."""
    before = contents(folder), sorted(folder.rglob("*"))
    yield
    assert (contents(folder), sorted(folder.rglob("*"))) == before


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny, Eager])
def test_save_refuses_an_unpruned_model(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    with assert_refused(model, ModelError, r"no plan .*fxprune\.compile.*torch\.save"):
        fxprune.save(model, tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_save_refuses_things_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, got dict"):
        fxprune.save({}, tmp_path / "saved")  # type: ignore[arg-type]


class Remembering(nn.Module):
    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def fuse(model: Any) -> None:
    block = model.body.get_submodule(next(name for name, part in model.body.named_modules() if name.endswith("conv")))
    block.bias = nn.Parameter(torch.zeros(8))


def swap_activation(model: Any) -> None:
    path = next(name for name, part in model.named_modules() if isinstance(part, nn.ReLU))
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.SiLU())


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another head": (
        lambda m: setattr(m, "weight", nn.Parameter(torch.rand(7, 8))),
        r"'weight' was a tensor \(5, 8\) and",
    ),
    "a weight more": (lambda m: m.register_parameter("new", nn.Parameter(torch.rand(2))), r"'new' is new"),
    "a weight less": (lambda m: delattr(m, "shift"), r"'shift' was a tensor \(5,\) and is gone"),
    "a bias more": (fuse, r"'body\..*\.conv\.bias' is new"),
    "another activation": (swap_activation, r"was a ReLU and is a SiLU"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_save_refuses_a_structure_changed_after_pruning(pruned: Any, name: str, tmp_path: Path) -> None:
    change, match = CHANGES[name]
    change(pruned)
    for twin in (pruned, copy.deepcopy(pruned)):
        with assert_refused(twin, StorageError, rf"changed after pruning.*{match}.*before pruning"):
            fxprune.save(twin, tmp_path / "saved")
    assert not any(tmp_path.iterdir())


class Branch(nn.Module):
    """Its forward calls the removed convolution between functions, so its forward becomes a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.conv(torch.exp(x)))


def test_save_refuses_a_changed_graph(tmp_path: Path) -> None:
    model = Eager().eval()
    model.body.append(Branch())
    branch = "body.5.conv"
    pruned: Any = fxprune.compile(
        model, labelled(), 0.05, loss=squared, heal="none", criterion=lambda region, _: float(region.name != branch)
    )
    graph = pruned.body[5].graph
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.neg, (output.args[0],)),)
    pruned.body[5].recompile()
    with assert_refused(pruned, StorageError, r"'body\.5' was the graph \w+ and is the graph \w+"):
        fxprune.save(pruned, tmp_path / "saved")


def test_save_refuses_a_structure_changed_between_two_prunings(pruned: Any, tmp_path: Path) -> None:
    fuse(pruned)
    twice = fxprune.compile(pruned, labelled(), loss=squared, criterion="l1")
    with pytest.raises(StorageError, match=r"\.conv\.bias' is new"):
        fxprune.save(twice, tmp_path / "saved")


def test_save_accepts_a_model_of_an_earlier_version_without_inventory(pruned: Any, tmp_path: Path) -> None:
    del pruned.fxprune_layout
    fuse(pruned)
    fxprune.save(pruned, tmp_path / "saved")
    with pytest.raises(StorageError, match=r"\.conv\.bias' .*fused .*saved before"):
        fxprune.load(Eager(), tmp_path / "saved")


def test_save_accepts_harmless_changes(pruned: Any, tmp_path: Path) -> None:
    pruned.criterion = nn.CrossEntropyLoss()
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(pruned)).eval()  # type: ignore[no-untyped-call]
    again = copy.deepcopy(copy.deepcopy(twin.half().float().train().eval()))
    fxprune.save(again, tmp_path / "saved")
    assert torch.equal(fxprune.load(Eager(), tmp_path / "saved")(X), again(X))


def test_inventory_ignores_values_and_sees_shapes() -> None:
    before = take_inventory(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    assert before == take_inventory(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double())
    assert compare_inventory(before, nn.Sequential(nn.Linear(2, 3))) == []
    weight, bias = compare_inventory(before, nn.Sequential(nn.Linear(2, 4), nn.ReLU()))
    assert all(part in weight for part in ("'0.weight'", "(3, 2)", "(4, 2)"))
    assert all(part in bias for part in ("'0.bias'", "(3,)", "(4,)"))


def test_save_refuses_state_that_is_no_tensor(tmp_path: Path) -> None:
    model = Eager().eval()
    model.memory = Remembering()
    pruned = fxprune.compile(model, labelled(), loss=squared, criterion="l1")
    with assert_refused(pruned, StorageError, r"'memory\._extra_state' .*no plain parameter"):
        fxprune.save(pruned, tmp_path / "saved")


def test_save_refuses_a_dtype_that_safetensors_lacks(pruned: Any, tmp_path: Path) -> None:
    pruned.shift = nn.Parameter(pruned.shift.to(torch.complex128))
    with assert_refused(pruned, StorageError, r"safetensors cannot hold the weights"):
        fxprune.save(pruned, tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_save_tells_weights_in_shared_memory_apart() -> None:
    memory = torch.arange(6.0)
    model = nn.Module()
    for name, part in {"low": memory[:4], "high": memory[2:], "same": memory[:4]}.items():
        model.register_buffer(name, part)
    state = weights.collect_state(model)
    assert {key: value.tolist() for key, value in state.values.items()} == {"low": [0, 1, 2, 3], "high": [2, 3, 4, 5]}
    assert state.tied == {"same": "low"}


# Places --------------------------------------------------------------------------------------------------------------


def test_save_replaces_an_earlier_save_only_with_overwrite(pruned_eager: Any, pruned: Any, tmp_path: Path) -> None:
    fxprune.save(pruned_eager, tmp_path / "saved")
    with torch.no_grad():
        pruned.shift.add_(1)
    with untouched(tmp_path), pytest.raises(StorageError, match=r"saved is not empty.*overwrite=True"):
        fxprune.save(pruned, tmp_path / "saved")
    fxprune.save(pruned, tmp_path / "saved", overwrite=True)
    assert torch.equal(fxprune.load(Eager(), tmp_path / "saved")(X), pruned(X))
    twice = fxprune.compile(pruned, labelled(), loss=squared, criterion="l1")
    fxprune.save(twice, tmp_path / "saved", overwrite=True)
    assert not (tmp_path / "saved" / "plan.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_save_accepts_an_empty_folder(pruned_eager: Any, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    fxprune.save(pruned_eager, str(tmp_path / "saved"))
    assert torch.equal(fxprune.load(Eager(), tmp_path / "saved")(X), pruned_eager(X))


@pytest.mark.parametrize("content", [b"not JSON", b"[]", b'{"name": "another tool"}'])
def test_save_keeps_folders_of_others(pruned_eager: Any, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_bytes(content)
    with untouched(tmp_path), pytest.raises(StorageError, match=r"photos .*manifest\.json.*no save"):
        fxprune.save(pruned_eager, tmp_path / "photos", overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "plan-0.json", "old/notes.txt", "plan-7.json/notes.txt"])
def test_save_keeps_a_save_that_holds_other_files(pruned_eager: Any, name: str, tmp_path: Path) -> None:
    fxprune.save(pruned_eager, tmp_path / "saved")
    (tmp_path / "saved" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "saved" / name).write_text("mine")
    with untouched(tmp_path), pytest.raises(StorageError, match=rf"saved .*{name.split('/')[0]}.*no save"):
        fxprune.save(pruned_eager, tmp_path / "saved", overwrite=True)


def test_save_refuses_places_that_are_no_folder(
    pruned_eager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with untouched(tmp_path):
        for place in (".", "", tmp_path / "here"):
            with pytest.raises(StorageError, match=r"here is the current directory"):
                fxprune.save(pruned_eager, place)
        for overwrite in (False, True):
            with pytest.raises(StorageError, match="is a file; give another"):
                fxprune.save(pruned_eager, tmp_path / "file", overwrite=overwrite)
        with pytest.raises(StorageError, match=r"file/below.* cannot be"):
            fxprune.save(pruned_eager, tmp_path / "file" / "below")
        for thing in (3, None, b"saved", "a\0b"):
            with pytest.raises(SettingError, match=r"folder .*give a path"):
                fxprune.save(pruned_eager, thing)  # type: ignore[arg-type]


# Interruptions -------------------------------------------------------------------------------------------------------


def failing(real: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    """A function that works until its `at`-th call."""
    calls = []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == at:
            raise error
        return real(*args, **options)

    return call


STEPS = [
    (os, "fsync", 1),
    (os, "fsync", 2),
    (os, "fsync", 3),
    (Path, "rename", 1),
    (Path, "replace", 1),
    (Path, "mkdir", 2),
]


@pytest.mark.parametrize(("owner", "name", "at"), STEPS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("earlier", [True, False])
def test_interrupted_save_keeps_the_earlier_files(
    pruned_eager: Any, pruned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int,
    error: BaseException, earlier: bool,
) -> None:  # fmt: skip
    if earlier:
        fxprune.save(pruned_eager, tmp_path / "saved")
    elif name == "rename":
        pytest.skip("without an earlier save there is one move only")
    with torch.no_grad():
        pruned.shift.add_(1)
    expected, match = (
        (StorageError, "cannot be written .*No space") if isinstance(error, OSError) else (type(error), None)
    )
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), at, error))
    with untouched(tmp_path), assert_unchanged(pruned), pytest.raises(expected, match=match):
        fxprune.save(pruned, tmp_path / "saved", overwrite=True)
    monkeypatch.undo()
    fxprune.save(pruned, tmp_path / "saved", overwrite=True)
    assert json.loads((tmp_path / "saved" / "manifest.json").read_text())["network"] == "Eager"
    assert torch.equal(fxprune.load(Eager(), tmp_path / "saved")(X), pruned(X))


def test_save_refuses_a_read_only_parent(pruned_eager: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir, 2, denied))
    with untouched(tmp_path), pytest.raises(StorageError, match=r"saved .*Permission.*check"):
        fxprune.save(pruned_eager, tmp_path / "saved")
