"""A pruned model of transformers goes to a folder by `save_pretrained` and comes back by `fxprune.from_pretrained`."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("transformers", reason='pip install "fxprune[huggingface]"')

from transformers import AutoModelForImageClassification

import fxprune
from fxprune.rewriting.pruned_module import PrunedModule
from tests.helpers.hostile import assert_unchanged
from tests.helpers.paths import ROOT
from tests.helpers.pretrained import (
    REMOVED,
    SmallPreTrained,
    batches,
    build_small,
    prune,
)


@pytest.fixture(scope="module")
def small() -> SmallPreTrained:
    return build_small()


@pytest.fixture(scope="module")
def pruned(small: SmallPreTrained) -> Any:
    made = prune(small, REMOVED)
    assert isinstance(made.get_submodule("blocks.waves"), PrunedModule)
    assert type(made.get_submodule("blocks.first")) is nn.Identity
    return made


@pytest.fixture
def folder(pruned: Any, tmp_path: Path) -> Path:
    pruned.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batches()[0]["pixel_values"]).logits


def assert_same(found: Any, expected: Any) -> None:
    """Class, structure, weights, all buffers, shared weights and history are equal."""
    assert type(found) is type(expected)
    for kind in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(ours) == list(theirs)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert len(list(found.parameters())) == len(list(expected.parameters()))
    assert torch.equal(logits(found), logits(expected))
    assert fxprune.report(found) == fxprune.report(expected)


@pytest.mark.parametrize("cls", [SmallPreTrained, AutoModelForImageClassification])
def test_from_pretrained_gives_the_pruned_model_back(cls: Any, pruned: Any, folder: Path) -> None:
    again = fxprune.from_pretrained(cls, folder)
    assert_same(again, pruned)
    assert not again.training
    assert vars(again.config).keys().isdisjoint({"fxprune", "transformers_weights"})


@pytest.mark.parametrize("cls", [SmallPreTrained, AutoModelForImageClassification])
def test_own_from_pretrained_refuses_a_pruned_folder_and_names_the_other(cls: Any, folder: Path) -> None:
    with pytest.raises((ValueError, OSError), match=r"pruned: load it with fxprune.from_pretrained\(SmallPreTrained"):
        cls.from_pretrained(folder)


def test_folder_has_json_and_safetensors_only_and_the_class_of_the_model(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["SmallPreTrained"]
    assert [plan["fxprune_plan"] for plan in config["fxprune"]] == [4]


def test_save_pretrained_of_the_original_is_as_before(small: SmallPreTrained, pruned: Any, tmp_path: Path) -> None:
    with assert_unchanged(pruned):
        pruned.save_pretrained(tmp_path / "pruned")
    small.save_pretrained(tmp_path / "full")
    assert "blocks.waves.both.weight" in load_file(tmp_path / "full" / "model.safetensors")
    assert torch.equal(logits(SmallPreTrained.from_pretrained(tmp_path / "full")), logits(small))
    assert "save_pretrained" not in vars(small)


@pytest.mark.parametrize(
    "arguments", [{"max_shard_size": "1KB"}, {"variant": "new"}, {"max_shard_size": "1KB", "variant": "new"}]
)
def test_shards_and_variants_come_back(arguments: dict[str, Any], pruned: Any, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path, **arguments)
    variant = {key: value for key, value in arguments.items() if key == "variant"}
    assert_same(fxprune.from_pretrained(SmallPreTrained, tmp_path, **variant), pruned)


def test_from_pretrained_takes_the_arguments_of_the_class(folder: Path) -> None:
    half, info = fxprune.from_pretrained(SmallPreTrained, folder, dtype=torch.bfloat16, output_loading_info=True)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    assert not info["missing_keys"]
    assert fxprune.from_pretrained(SmallPreTrained, folder, output_attentions=True).config.output_attentions


def test_half_precision_is_saved_and_loaded(pruned: Any, tmp_path: Path) -> None:
    half = copy.deepcopy(pruned).bfloat16()
    half.save_pretrained(tmp_path)
    again = fxprune.from_pretrained(SmallPreTrained, tmp_path)
    assert all(torch.equal(value, half.state_dict()[key]) for key, value in again.state_dict().items())


def test_loaded_model_trains_and_is_pruned_and_saved_again(folder: Path, tmp_path: Path) -> None:
    again = fxprune.from_pretrained(SmallPreTrained, folder)
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again.train()(**batches()[0]).loss.backward()
    optimizer.step()
    twice = prune(again.eval(), {"blocks.last"})
    twice.save_pretrained(tmp_path / "twice")  # type: ignore[operator]
    final = fxprune.from_pretrained(AutoModelForImageClassification, tmp_path / "twice")
    assert_same(final, twice)
    assert len(json.loads((tmp_path / "twice" / "config.json").read_text(encoding="utf-8"))["fxprune"]) == 2


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves_with_their_plans(copied: Callable[[Any], Any], pruned: Any, tmp_path: Path) -> None:
    twin = copied(copy.deepcopy(pruned))
    twin.fc.bias.data.fill_(3)
    twin.save_pretrained(tmp_path)
    assert_same(fxprune.from_pretrained(SmallPreTrained, tmp_path), twin)


@pytest.mark.slow
def test_pickle_saves_itself_with_its_plans_in_another_process(pruned: Any, tmp_path: Path) -> None:
    torch.save(pruned, tmp_path / "model.pt")
    code = "import torch, sys; torch.load(sys.argv[1], weights_only=False).save_pretrained(sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "out"], check=True, cwd=ROOT)
    assert_same(fxprune.from_pretrained(SmallPreTrained, tmp_path / "out"), pruned)


def test_pushed_folder_has_the_plans(pruned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = sys.modules[type(pruned).push_to_hub.__module__]
    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    def upload(self: Any, folder: Path, *_: Any, **__: Any) -> None:
        seen["model"] = fxprune.from_pretrained(SmallPreTrained, folder)

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(SmallPreTrained, "_upload_modified_files", upload)
    pruned.push_to_hub("someone/pruned")
    assert_same(seen["model"], pruned)
    with pytest.raises(fxprune.StorageError, match=r"push_to_hub\(repo_id\)"):
        pruned.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not (tmp_path / "pushed").exists()
