"""What could grow back silently is refused by name: parts, changed models, other libraries, folders that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason='pip install "fxprune[huggingface]"')

from huggingface_hub import PyTorchModelHubMixin

import fxprune
from fxprune.rewriting.pruned_module import plain_attributes
from tests.helpers.hostile import assert_refused
from tests.helpers.models import Tiny, labelled
from tests.helpers.pretrained import SmallConfig, SmallPreTrained, batches, build_small, prune
from tests.helpers.removals import plan_for


class Shared(Tiny, PyTorchModelHubMixin):  # type: ignore[misc]
    """Saves and loads itself by the mixin for models of any kind."""


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = build_small(), build_small()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        found = self.inner(pixel_values, labels)
        return self.other(pixel_values + found.logits.mean(), labels)


@pytest.fixture(scope="module")
def pruned() -> Any:
    return prune(build_small(), {"blocks.first"})


@pytest.fixture
def folder(pruned: Any, tmp_path: Path) -> Path:
    pruned.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_save_pretrained_after_a_change_of_the_structure_is_refused(pruned: Any, tmp_path: Path) -> None:
    changed = copy.deepcopy(pruned)
    changed.fc = nn.Linear(8, 9)
    with assert_refused(changed, fxprune.StorageError, "changed after pruning.*'fc.weight' was"):
        changed.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_save_pretrained_of_a_distributed_checkpoint_is_refused(pruned: Any, tmp_path: Path) -> None:
    with assert_refused(pruned, fxprune.StorageError, "distributed_checkpoint"):
        pruned.save_pretrained(tmp_path / "saved", distributed_checkpoint=True)


def test_save_pretrained_on_another_process_writes_no_plan(pruned: Any, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "config.json").exists()


def test_save_pretrained_of_a_part_is_refused_if_something_of_it_was_removed(tmp_path: Path) -> None:
    made: Any = prune(Holder().eval(), {"inner.blocks.first"})
    with assert_refused(made, fxprune.StorageError, "'inner' is a part of a pruned Holder"):
        made.inner.save_pretrained(tmp_path / "inner")
    assert "save_pretrained" not in plain_attributes(made.inner)
    made.other.save_pretrained(tmp_path / "other")
    again = SmallPreTrained.from_pretrained(tmp_path / "other")
    assert all(torch.equal(value, made.other.state_dict()[key]) for key, value in again.state_dict().items())


def test_save_pretrained_of_other_libraries_is_refused(tmp_path: Path) -> None:
    made: Any = fxprune.compile(Shared().eval(), labelled(), 0.2, heal="none")
    with assert_refused(made, fxprune.StorageError, "of Shared would build the whole.*fxprune.save"):
        made.save_pretrained(tmp_path / "shared")
    with pytest.raises(fxprune.SettingError, match=r"'Shared'.*fxprune.load"):
        fxprune.from_pretrained(Shared, tmp_path)


@pytest.mark.filterwarnings("ignore:.*looks untrained:fxprune.FxpruneWarning")
def test_save_pretrained_of_a_model_that_became_a_graph_is_refused(tmp_path: Path) -> None:
    class Plain(SmallPreTrained):
        def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
            x = self.blocks(self.stem(pixel_values))
            return self.fc((x + self.same[0](torch.relu(x) + 1)).mean((2, 3)))

    model = Plain(SmallConfig()).eval()
    images = [batches()[0]["pixel_values"]]
    analysis = fxprune.analyze(model, images, criterion="l1")
    made: Any = fxprune.apply(model, plan_for(analysis, {"same"}))
    with pytest.raises(fxprune.StorageError, match=r"Plain itself became a graph.*fxprune.save"):
        made.save_pretrained(tmp_path / "plain")


def test_from_pretrained_of_weights_that_do_not_fit_names_them(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "fc.bias"}, folder / "model.safetensors")
    with pytest.raises(fxprune.StorageError, match=r"'fc.bias' is missing"):
        fxprune.from_pretrained(SmallPreTrained, folder)
    save_file({**weights, "blocks.first.conv.weight": torch.zeros(8, 8, 3, 3)}, folder / "model.safetensors")
    with pytest.raises(fxprune.StorageError, match=r"'blocks.first.conv.weight' is not in the model"):
        fxprune.from_pretrained(SmallPreTrained, folder)


def test_from_pretrained_of_another_structure_names_the_folder(folder: Path) -> None:
    with pytest.raises(fxprune.PlanError, match=r"saved: island 'stem'.*fingerprint.*class that was saved"):
        fxprune.from_pretrained(SmallPreTrained, folder, width=12)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        (None, "has no plan"),
        ([], "has no plan"),
        ("text", "has no plan"),
        ([{}], "no fxprune plan"),
        ([3], "no fxprune"),
    ],
)
def test_from_pretrained_of_a_broken_plan_names_the_file(plans: Any, message: str, folder: Path) -> None:
    change_config(folder, fxprune=plans)
    with pytest.raises((fxprune.StorageError, fxprune.PlanError), match=f"config.json.*{message}"):
        fxprune.from_pretrained(SmallPreTrained, folder)


def test_from_pretrained_of_a_whole_model_names_the_way(tmp_path: Path) -> None:
    build_small().save_pretrained(tmp_path)
    with pytest.raises(fxprune.StorageError, match=r"no plan.*from_pretrained of its class"):
        fxprune.from_pretrained(SmallPreTrained, tmp_path)


@pytest.mark.parametrize("place", ["missing/folder", "/missing/folder"])
def test_from_pretrained_of_a_missing_folder_names_it(place: str) -> None:
    with pytest.raises(fxprune.StorageError, match=f"{place} is no folder"):
        fxprune.from_pretrained(SmallPreTrained, place)


@pytest.mark.parametrize("cls", [nn.Linear, build_small, "SmallPreTrained", None])
def test_from_pretrained_of_no_class_of_transformers_is_refused(cls: Any, folder: Path) -> None:
    with pytest.raises(fxprune.SettingError, match=r"cls is .*AutoModel"):
        fxprune.from_pretrained(cls, folder)
