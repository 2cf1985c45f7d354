"""Models and images that the command line opens, and its errors for invalid ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision

from fxprune.cli.app import main
from fxprune.cli.calibration_images import calibration_batches, open_images, open_unused_images
from fxprune.cli.models import fill_weights, open_model
from fxprune.cli.options import DataOptions, ModelOptions
from fxprune.datasets.folders import ImageFolder
from fxprune.demo.bundled import build_detector, load_dataset, load_detector
from fxprune.errors import DatasetError, FxpruneWarning, ModelError, SettingError, StorageError
from tests.helpers.commands import VAL, Captured, refusal


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write the user's module ``mine`` in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> None:
        sys.modules.pop("mine", None)
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")

    yield write
    sys.modules.pop("mine", None)


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("retinanet_resnet50_fpn", "did you mean torchvision:retinanet_resnet50_fpn"),
        ("torchvision:retinanet_resnet50", "did you mean retinanet_resnet50_fpn"),
        ("ultralytics:yolov8n", r"\.pt .*\.yaml"),
        ("ultralytics:nothere.pt", "cannot load nothere.pt"),
        ("ultralytics:nothere.yaml", "cannot load nothere.yaml"),
        ("nothere_at_all:build", "there is no module 'nothere_at_all'"),
    ],
)
def test_unknown_models_are_refused(name: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        open_model(ModelOptions(name), "cpu")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def build():\n    return 1 / 0\n", r"mine:build failed: ZeroDivisionError.*mine.py, line 2"),
        ("import nothere_at_all\n", r"ModuleNotFoundError.*mine.py, line 1"),
        ("def build(:\n", r"SyntaxError.*mine.py, line 1"),
        ("import sys\nsys.exit(3)\n", r"mine .*SystemExit.*line 2"),
        ("def build():\n    return 'a string'\n", "returned str"),
        ("other = 1\n", "has no 'build'"),
    ],
)
def test_errors_in_a_user_module_are_readable(own: Callable[[str], None], source: str, text: str) -> None:
    own(source)
    with pytest.raises(ModelError, match=text):
        open_model(ModelOptions("mine:build"), "cpu")


def test_output_of_a_user_module_does_not_go_to_stdout(own: Callable[[str], None], capsys: Captured) -> None:
    own("from fxprune.demo.bundled import load_detector\nprint('hello')\ndef build():\n    return load_detector()\n")
    assert main(["eval", "mine:build", "--json", "--images", str(VAL / "images"), "--annotations",
                 str(VAL / "annotations.json"), "--limit", "4"]) == 0  # fmt: skip
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 4
    assert "hello" in captured.err


def test_torchvision_weights_without_a_connection_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    name = "torchvision:ssdlite320_mobilenet_v3_large"
    with pytest.raises(ModelError, match="no connection"):
        open_model(ModelOptions(name, weights="DEFAULT"), "cpu")
    with pytest.raises(SettingError, match="torchvision knows COCO_V1, DEFAULT"):
        open_model(ModelOptions(name, weights="NOPE"), "cpu")


def test_fill_weights_reads_a_file(tmp_path: Path) -> None:
    trained, fresh = load_detector(), build_detector()
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "b.pth")
    for name in ("a.safetensors", "b.pth"):
        model = build_detector()
        fill_weights(model, tmp_path / name)
        assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.state_dict().items())
    state = dict(trained.state_dict())
    state["stranger"] = state.pop("backbone.laterals.0.0.weight")
    state["backbone.laterals.1.0.weight"] = state["backbone.laterals.1.0.weight"][:1]
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(StorageError) as error:
        fill_weights(fresh, tmp_path / "c.pth")
    for text in ("'backbone.laterals.0.0.weight' is missing", "'stranger' is not in the model", "in the file and"):
        assert text in str(error.value)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "b.pth").write_text("nothing", encoding="utf-8")
    torch.save(load_detector(), tmp_path / "c.pth")
    torch.save([1, 2], tmp_path / "d.pth")
    for name in ("a.safetensors", "b.pth", "c.pth"):
        with pytest.raises(StorageError, match=f"{name} holds no plain weights"):
            fill_weights(build_detector(), tmp_path / name)
    with pytest.raises(StorageError, match="not a state_dict"):
        fill_weights(build_detector(), tmp_path / "d.pth")


def test_open_model_sets_the_number_of_classes() -> None:
    detector: Any = open_model(ModelOptions("torchvision:ssdlite320_mobilenet_v3_large", classes=5), "cpu")
    assert detector.head.classification_head.num_columns == 5
    assert not detector.training
    yolo: Any = open_model(ModelOptions("ultralytics:yolov8n.yaml", classes=7), "cpu")
    assert len(yolo.model.names) == yolo.model.model[-1].nc == 7
    with pytest.raises(SettingError, match="number of classes in the function"):
        open_model(ModelOptions("mine:build", classes=5), "cpu")


# Images --------------------------------------------------------------------------------------------------------------


def test_image_folder_skips_other_files_and_refuses_broken_images(images: Path, capsys: Captured) -> None:
    assert len(ImageFolder(images)) == 4
    (images / "notes.txt").write_text("no image", encoding="utf-8")
    (images / ".hidden").write_text("no image", encoding="utf-8")
    with pytest.warns(FxpruneWarning, match=r"1 file\(s\).*images"):
        assert len(ImageFolder(images)) == 4
    (images / "broken.jpg").write_text("no image", encoding="utf-8")
    text = refusal(capsys, "analyze", "bundled", "--images", images)
    assert "note:" in text
    assert "broken.jpg" in text
    assert "cannot be read" in text


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no image"):
        ImageFolder(tmp_path)
    with pytest.raises(DatasetError, match="is no folder"):
        ImageFolder(tmp_path / "nothere")


def test_classifiers_accept_images_without_labels(images: Path) -> None:
    model = open_model(ModelOptions("torchvision:resnet18"), "cpu")
    options = DataOptions(images=images, size=64, batch=3)
    loader = calibration_batches(model, open_images(model, options, "calibration"), options)
    assert [tuple(batch.shape) for batch in loader] == [(3, 3, 64, 64), (1, 3, 64, 64)]


def test_limit_spreads_the_images_evenly() -> None:
    pictures = open_images(load_detector(), DataOptions(limit=4), "val")
    assert [pictures.dataset[index][1]["image_id"] for index in range(4)] == [1, 51, 101, 151]
    assert len(open_images(load_detector(), DataOptions(), "val").dataset) == 200


def test_unused_images_are_none_of_the_calibration(images: Path) -> None:
    model, options = load_detector(), DataOptions(images=images, limit=3)
    used, others = open_images(model, options, "calibration"), open_unused_images(model, options, "none")
    assert others is not None
    shown = [[pictures.dataset[index][0] for index in range(len(pictures.dataset))] for pictures in (used, others)]
    assert [len(rows) for rows in shown] == [3, 1]
    assert not any(torch.equal(image, shown[1][0]) for image in shown[0])
    assert open_unused_images(model, DataOptions(images=images), "none") is None
    bundled = open_unused_images(model, DataOptions(), "none")
    assert bundled is not None
    assert len(bundled.dataset) == 64
    assert bundled.dataset[1][1]["image_id"] == load_dataset("val")[3][1]["image_id"]


def test_annotations_that_do_not_fit_are_refused(images: Path, tmp_path: Path, capsys: Captured) -> None:
    content = json.loads((VAL / "annotations.json").read_text(encoding="utf-8"))
    file = tmp_path / "annotations.json"

    def refused(**changes: Any) -> str:
        file.write_text(json.dumps(content | changes), encoding="utf-8")
        return refusal(capsys, "analyze", "bundled", "--images", images, "--annotations", file)

    assert "000005.jpg is missing" in refused(images=content["images"][:5], annotations=[])
    absent = content["annotations"][0] | {"image_id": 99999}
    assert "image 99999" in refused(annotations=[absent])
    named = [{"id": category["id"], "name": f"cat {category['id']}"} for category in content["categories"]]
    assert "no class with the name" in refused(categories=named)
    file.write_text('{"images": [', encoding="utf-8")
    text = refusal(capsys, "analyze", "bundled", "--images", images, "--annotations", file)
    assert "cannot be read as JSON" in text
