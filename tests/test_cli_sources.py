"""Where the command line gets models and images from, and how it says that something is wrong with them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision

from fxprune.bundled import build_detector, load_dataset, load_detector
from fxprune.cli import main
from fxprune.commands.data import calibration_batches, open_pictures
from fxprune.commands.folders import ImageFolder, YoloDataset
from fxprune.commands.models import fill_weights, open_model
from fxprune.commands.options import DataOptions, ModelOptions
from fxprune.errors import DatasetError, FxpruneError, FxpruneWarning, ModelError, SettingError, StorageError
from tests.test_cli import refusal

VAL = Path(str(resources.files("fxprune") / "data" / "val"))
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((VAL / "images").iterdir())[:4]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def yolo(tmp_path: Path, images: Path) -> Path:
    """The bundled images 1 to 4 in ultralytics' form, with their true labels."""
    labels = tmp_path / "labels"
    labels.mkdir()
    for name, (image, target) in zip(sorted(images.iterdir()), load_dataset("val"), strict=False):
        sizes = torch.tensor([image.shape[-1], image.shape[-2]] * 2)
        boxes = target["boxes"] / sizes
        rows = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        lines = [" ".join(map(str, [int(c) - 1, *row])) for c, row in zip(target["labels"], rows, strict=True)]
        (labels / f"{name.stem}.txt").write_text("\n".join(lines), encoding="utf-8")
    file = tmp_path / "data.yaml"
    file.write_text(f"train: images\nval: images\nnames: {[str(digit) for digit in range(10)]}\n", encoding="utf-8")
    return file


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
        ("ultralytics:yolov8n", "neither a .pt nor a .yaml"),
        ("ultralytics:nothere.pt", "cannot load nothere.pt"),
        ("ultralytics:nothere.yaml", "cannot load nothere.yaml"),
        ("nothere_at_all:build", "there is no module 'nothere_at_all'"),
    ],
)
def test_unknown_models(name: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        open_model(ModelOptions(name), "cpu")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def build():\n    return 1 / 0\n", r"mine:build failed: ZeroDivisionError.*mine.py, line 2"),
        ("import nothere_at_all\n", r"importing mine failed: ModuleNotFoundError.*mine.py, line 1"),
        ("def build(:\n", r"importing mine failed: SyntaxError.*mine.py, line 1"),
        ("import sys\nsys.exit(3)\n", r"importing mine failed: SystemExit.*line 2"),
        ("def build():\n    return 'a string'\n", "gave str"),
        ("other = 1\n", "has no 'build'"),
    ],
)
def test_errors_in_the_users_module_are_readable(own: Callable[[str], None], source: str, text: str) -> None:
    own(source)
    with pytest.raises(ModelError, match=text):
        open_model(ModelOptions("mine:build"), "cpu")


def test_what_the_users_module_prints_is_no_result(own: Callable[[str], None], capsys: Captured) -> None:
    own("from fxprune.bundled import load_detector\nprint('hello')\ndef build():\n    return load_detector()\n")
    assert main(["eval", "mine:build", "--json", "--images", str(VAL / "images"), "--annotations",
                 str(VAL / "annotations.json"), "--limit", "4"]) == 0  # fmt: skip
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 4
    assert "hello" in captured.err


def test_weights_of_torchvision_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    name = "torchvision:ssdlite320_mobilenet_v3_large"
    with pytest.raises(ModelError, match="no connection"):
        open_model(ModelOptions(name, weights="DEFAULT"), "cpu")
    with pytest.raises(SettingError, match="torchvision knows COCO_V1, DEFAULT"):
        open_model(ModelOptions(name, weights="NOPE"), "cpu")


def test_weights_of_a_file(tmp_path: Path) -> None:
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


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    (tmp_path / "b.pth").write_text("nothing", encoding="utf-8")
    torch.save(load_detector(), tmp_path / "c.pth")
    torch.save([1, 2], tmp_path / "d.pth")
    for name in ("a.safetensors", "b.pth", "c.pth"):
        with pytest.raises(StorageError, match=f"{name} holds no plain weights"):
            fill_weights(build_detector(), tmp_path / name)
    with pytest.raises(StorageError, match="not a state_dict"):
        fill_weights(build_detector(), tmp_path / "d.pth")


def test_number_of_classes() -> None:
    detector: Any = open_model(ModelOptions("torchvision:ssdlite320_mobilenet_v3_large", classes=5), "cpu")
    assert detector.head.classification_head.num_columns == 5
    assert not detector.training
    yolo: Any = open_model(ModelOptions("ultralytics:yolov8n.yaml", classes=7), "cpu")
    assert len(yolo.model.names) == yolo.model.model[-1].nc == 7
    with pytest.raises(SettingError, match="let the function build"):
        open_model(ModelOptions("mine:build", classes=5), "cpu")


# Images --------------------------------------------------------------------------------------------------------------


def test_images_alone_and_what_lies_among_them(images: Path, capsys: Captured) -> None:
    assert len(ImageFolder(images)) == 4
    (images / "notes.txt").write_text("no image", encoding="utf-8")
    (images / ".hidden").write_text("no image", encoding="utf-8")
    with pytest.warns(FxpruneWarning, match=r"1 file\(s\) that are no images by their name"):
        assert len(ImageFolder(images)) == 4
    (images / "broken.jpg").write_text("no image", encoding="utf-8")
    text = refusal(capsys, "analyze", "bundled", "--images", images)
    assert "note:" in text
    assert "broken.jpg, cannot be read as an image: its format is not known" in text


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no image"):
        ImageFolder(tmp_path)
    with pytest.raises(DatasetError, match="is no folder"):
        ImageFolder(tmp_path / "nothere")


def test_classifiers_take_images_alone(images: Path) -> None:
    model = open_model(ModelOptions("torchvision:resnet18"), "cpu")
    options = DataOptions(images=images, size=64, batch=3)
    loader = calibration_batches(model, open_pictures(model, options, "calibration"), options)
    assert [tuple(batch.shape) for batch in loader] == [(3, 3, 64, 64), (1, 3, 64, 64)]


def test_limit_spreads_the_images_evenly() -> None:
    pictures = open_pictures(load_detector(), DataOptions(limit=4), "val")
    assert [pictures.dataset[index][1]["image_id"] for index in range(4)] == [1, 51, 101, 151]
    assert len(open_pictures(load_detector(), DataOptions(), "val").dataset) == 200


def test_annotations_that_do_not_fit(images: Path, tmp_path: Path, capsys: Captured) -> None:
    content = json.loads((VAL / "annotations.json").read_text(encoding="utf-8"))
    file = tmp_path / "annotations.json"

    def refused(**changes: Any) -> str:
        file.write_text(json.dumps(content | changes), encoding="utf-8")
        return refusal(capsys, "analyze", "bundled", "--images", images, "--annotations", file)

    assert "000005.jpg is missing" in refused(images=content["images"][:5], annotations=[])
    absent = content["annotations"][0] | {"image_id": 99999}
    assert "not among 'images'" in refused(annotations=[absent])
    named = [{"id": category["id"], "name": f"cat {category['id']}"} for category in content["categories"]]
    assert "the model has no class named like the data set's" in refused(categories=named)
    file.write_text('{"images": [', encoding="utf-8")
    text = refusal(capsys, "analyze", "bundled", "--images", images, "--annotations", file)
    assert "cannot be read as JSON" in text


def test_a_detector_with_too_few_classes_is_wrong_for_the_data(yolo: Path) -> None:
    model = open_model(ModelOptions("torchvision:ssdlite320_mobilenet_v3_large", classes=5), "cpu")
    with pytest.raises(SettingError, match=r"knows classes 1 to 4 .* goes up to 10; build it with --classes 11"):
        open_pictures(model, DataOptions(data=yolo), "val")


# Ultralytics' form ---------------------------------------------------------------------------------------------------


def test_yolo_labels_are_those_of_the_coco_file(yolo: Path) -> None:
    dataset, truth = YoloDataset(yolo, "val"), load_dataset("val")
    assert (len(dataset), dataset.categories[9]) == (4, "9")
    for index in range(4):
        (image, target), (true_image, true_target) = dataset[index], truth[index]
        assert torch.equal(image, true_image)
        assert torch.equal(target["labels"] + 1, true_target["labels"])
        torch.testing.assert_close(target["boxes"], true_target["boxes"], atol=0.01, rtol=0)


def test_yolo_data_gives_the_same_map_as_the_coco_file(
    yolo: Path, images: Path, tmp_path: Path, capsys: Captured
) -> None:
    content = json.loads((VAL / "annotations.json").read_text(encoding="utf-8"))
    kept = {entry["id"] for entry in content["images"][:4]}
    content["images"] = content["images"][:4]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    (tmp_path / "coco.json").write_text(json.dumps(content), encoding="utf-8")
    ways = (["--data", str(yolo)], ["--images", str(images), "--annotations", str(tmp_path / "coco.json")])
    found = []
    for way in ways:
        assert main(["eval", "bundled", "--json", *way]) == 0
        found.append(json.loads(capsys.readouterr().out)["mAP"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] > 0.4


def test_yolo_models_without_names_are_matched_by_number(yolo: Path) -> None:
    model = open_model(ModelOptions("ultralytics:yolov8n.yaml", classes=10), "cpu")
    yolo.write_text(yolo.read_text(encoding="utf-8").replace("'3'", "three"), encoding="utf-8")
    options = DataOptions(data=yolo, size=64)
    pictures = open_pictures(model, options, "calibration")
    assert pictures.labels == {number: number for number in range(10)}
    (batch,) = calibration_batches(model, pictures, options)
    assert batch["img"].shape == (4, 3, 64, 64)
    assert int(batch["cls"].max()) <= 9


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("3 0.5 0.5 0.2", "4 numbers"),
        ("3 0.5 0.5 0.2 wide", "line 1: not numbers"),
        ("10 0.5 0.5 0.2 0.2", "class 10, but the names are of 0 to 9"),
        ("1.5 0.5 0.5 0.2 0.2", "class 1.5"),
        ("3 80 80 20 20", r"leaves \[0, 1\]"),
        ("3 nan 0.5 0.2 0.2", r"leaves \[0, 1\]"),
        ("3 0.5 0.5 0 0.2", "no width or no height"),
    ],
)
def test_broken_yolo_labels_name_the_line(yolo: Path, line: str, text: str) -> None:
    dataset = YoloDataset(yolo, "val")
    (yolo.parent / "labels" / f"{dataset.files[0].stem}.txt").write_text(line, encoding="utf-8")
    with pytest.raises(DatasetError, match=text):
        dataset[0]


def test_polygons_become_boxes_and_double_lines_count_once(yolo: Path) -> None:
    dataset = YoloDataset(yolo, "val")
    file = yolo.parent / "labels" / f"{dataset.files[0].stem}.txt"
    file.write_text("2 0.25 0.5 0.5 0.25 0.75 0.5\n3 0.5 0.5 0.5 0.5\n\n3 0.5 0.5 0.5 0.5\n", encoding="utf-8")
    target = dataset[0][1]
    assert target["labels"].tolist() == [2, 3]
    assert target["boxes"].tolist() == [[40, 40, 120, 80], [40, 40, 120, 120]]
    (yolo.parent / "labels" / f"{dataset.files[1].stem}.txt").unlink()
    assert len(dataset[1][1]["labels"]) == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("names: [a", "cannot be read as YAML"),
        ("just words", "no data set of ultralytics' form"),
        ("val: images", "'names' should be"),
        ("val: images\nnames: {1: a, 2: b}", "'names' should be"),
        ("train: images\nnames: [a]", "has no 'val'"),
        ("val: elsewhere\nnames: [a]", "elsewhere is missing"),
        ("val: pictures\nnames: [a]", "none of the 4 images has labels"),
    ],
)
def test_broken_yaml(yolo: Path, images: Path, content: str, text: str) -> None:
    shutil.copytree(images, yolo.parent / "pictures")
    yolo.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=text):
        YoloDataset(yolo, "val")


def test_yaml_with_a_root_a_list_and_a_text_file(yolo: Path, images: Path) -> None:
    names = sorted(path.name for path in images.iterdir())
    (yolo.parent / "some.txt").write_text("\n".join(f"./images/{name}" for name in names[:2]), encoding="utf-8")
    head = f"path: {yolo.parent}\nnames: {{{', '.join(f'{digit}: d{digit}' for digit in range(10))}}}\n"
    yolo.write_text(f"{head}val: [some.txt, ../images]\n", encoding="utf-8")
    assert len(YoloDataset(yolo, "val")) == 2 + 4
    assert issubclass(DatasetError, FxpruneError)
