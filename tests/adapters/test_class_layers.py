"""A pruned network of ultralytics gets the classes of other data; all other layers keep their weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.adapters.ultralytics.class_layers import build_full, class_layers, fit_classes
from fxprune.adapters.ultralytics.pruned_yaml import mark_pruned, marked, unmarked

ultralytics = pytest.importorskip("ultralytics")
LAST = [f"model.22.cv3.{level}.2" for level in range(3)]


def named(names: dict[int, str]) -> Any:
    """A small YOLO with names, marked as pruned, whose second box layer was removed."""
    network = ultralytics.YOLO("yolov8n.yaml").model
    network = type(network)(copy.deepcopy(network.yaml), nc=len(names), verbose=False)
    network.names = names
    network.model[-1].cv2[0][1] = nn.Identity()
    mark_pruned(network)
    return network


def full_of(network: Any, names: dict[int, str]) -> Any:
    full: Any = build_full(network, len(names))
    full.names = names
    return full


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return named({0: "cat", 1: "dog", 2: "fox", 3: "owl"})


@pytest.mark.parametrize(
    ("yaml", "layers"),
    [
        ("yolov8n.yaml", LAST),
        ("yolov8n-cls.yaml", ["model.9.linear"]),
        ("yolov10n.yaml", [f"model.23.{part}.{level}.2" for part in ("cv3", "one2one_cv3") for level in range(3)]),
    ],
)
def test_class_layers_are_those_with_a_row_per_class(yaml: str, layers: list[str]) -> None:
    assert class_layers(ultralytics.YOLO(yaml).model) == layers


def test_rows_of_known_names_move_and_others_are_new(network: Any) -> None:
    new: Any = fit_classes(network, full_of(network, {0: "Owl", 1: "bee", 2: "cat "}), by_name=True)
    for path in LAST:
        old, layer = network.get_submodule(path), new.get_submodule(path)
        assert len(layer.weight) == len(layer.bias) == layer.out_channels == 3
        assert torch.equal(layer.weight[[0, 2]], old.weight[[3, 0]])
        assert torch.equal(layer.bias[[0, 2]], old.bias[[3, 0]])
        assert not any(torch.equal(layer.weight[1], row) for row in old.weight)
    head = new.model[-1]
    assert (head.nc, head.no) == (3, 3 + 64)
    assert type(head.cv2[0][1]) is nn.Identity
    assert new.names == {0: "Owl", 1: "bee", 2: "cat "}
    assert new.yaml["nc"] == unmarked(new.yaml)["nc"] == 3
    assert len(new.eval()(torch.rand(1, 3, 64, 64))[0][0]) == 4 + 3


def test_the_network_is_not_changed_and_other_layers_are_kept(network: Any) -> None:
    before = copy.deepcopy(network.state_dict())
    new = fit_classes(network, full_of(network, {0: "bee"}), by_name=True)
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    kept = {key: value for key, value in new.state_dict().items() if not key.startswith(tuple(LAST))}
    assert kept.keys() == {key for key in before if not key.startswith(tuple(LAST))}
    assert all(torch.equal(value, before[key]) for key, value in kept.items())


@pytest.mark.parametrize("by_name", [True, False])
def test_classes_in_another_order_move_only_by_name(network: Any, by_name: bool) -> None:
    new: Any = fit_classes(network, full_of(network, {0: "owl", 1: "fox", 2: "dog", 3: "cat"}), by_name=by_name)
    old, layer = (part.get_submodule(LAST[0]) for part in (network, new))
    assert torch.equal(layer.weight, old.weight.flip(0) if by_name else old.weight)


def test_a_last_layer_that_became_an_identity_is_made_again() -> None:
    names = {index: f"thing {index}" for index in range(80)}
    network = named(names)
    network.model[-1].cv3[0][2] = nn.Identity()  # 80 channels go in, and 80 classes come out
    new: Any = fit_classes(network, full_of(network, {0: "bee"}), by_name=True)
    layer = new.model[-1].cv3[0][2]
    assert (layer.in_channels, layer.out_channels) == (80, 1)
    assert len(new.eval()(torch.rand(1, 3, 64, 64))[0][0]) == 4 + 1


def test_a_last_layer_that_is_gone_is_named(network: Any) -> None:
    broken = copy.deepcopy(network)
    del broken.model[-1].cv3[1][2]
    with pytest.raises(fxprune.ModelError, match=r"model\.22\.cv3\.1\.2 has a row per class and was removed"):
        fit_classes(broken, full_of(network, {0: "bee"}), by_name=True)


def test_other_settings_of_the_data_are_named(network: Any) -> None:
    full = full_of(network, {0: "bee"})
    full.yaml["channels"] = 1
    with pytest.raises(fxprune.ModelError, match="channels=1 in place of 3"):
        fit_classes(network, full, by_name=True)


def test_pruning_again_counts_the_files_and_keeps_the_full_yaml() -> None:
    network: Any = ultralytics.YOLO("yolov8n.yaml").model
    yaml = copy.deepcopy(network.yaml)
    files = []
    for _ in range(3):
        mark_pruned(network)
        files.append(network.pt_path)
    assert files == ["yolov8n_pruned.pt", "yolov8n_pruned2.pt", "yolov8n_pruned3.pt"]
    assert unmarked(network.yaml) == yaml
    assert marked(network.yaml) == network.yaml
