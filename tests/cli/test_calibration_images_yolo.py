"""Data sets in ultralytics' format: the same items as from the COCO file, and errors that name the line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fxprune.cli.app import main
from fxprune.cli.calibration_images import calibration_batches, open_images, open_unused_images
from fxprune.cli.models import open_model
from fxprune.cli.options import DataOptions, ModelOptions
from fxprune.datasets.folders import YoloDataset
from fxprune.demo.bundled import load_dataset
from fxprune.errors import DatasetError, FxpruneError, SettingError
from tests.helpers.commands import VAL, Captured


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


def test_yolo_labels_equal_those_of_the_coco_file(yolo: Path) -> None:
    dataset, truth = YoloDataset(yolo, "val"), load_dataset("val")
    assert (len(dataset), dataset.categories[9]) == (4, "9")
    for index in range(4):
        (image, target), (true_image, true_target) = dataset[index], truth[index]
        assert torch.equal(image, true_image)
        assert torch.equal(target["labels"] + 1, true_target["labels"])
        torch.testing.assert_close(target["boxes"], true_target["boxes"], atol=0.01, rtol=0)


def test_yolo_data_whose_splits_are_the_same_files_has_no_unused_images(yolo: Path) -> None:
    model = open_model(ModelOptions("bundled"), "cpu")
    assert open_unused_images(model, DataOptions(data=yolo), "none") is None
    others = open_unused_images(model, DataOptions(data=yolo, limit=3), "none")
    assert others is not None
    assert (len(others.dataset), others.labelled) == (1, True)


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
    pictures = open_images(model, options, "calibration")
    assert pictures.labels == {number: number for number in range(10)}
    (batch,) = calibration_batches(model, pictures, options)
    assert batch["img"].shape == (4, 3, 64, 64)
    assert int(batch["cls"].max()) <= 9


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("3 0.5 0.5 0.2", "4 numbers"),
        ("3 0.5 0.5 0.2 wide", "line 1: not numbers"),
        ("10 0.5 0.5 0.2 0.2", "class 10, .*0 to 9"),
        ("1.5 0.5 0.5 0.2 0.2", "class 1.5"),
        ("3 80 80 20 20", r"\[0, 1\]"),
        ("3 nan 0.5 0.2 0.2", r"\[0, 1\]"),
        ("3 0.5 0.5 0 0.2", "no width or no height"),
    ],
)
def test_broken_yolo_labels_name_the_line(yolo: Path, line: str, text: str) -> None:
    dataset = YoloDataset(yolo, "val")
    (yolo.parent / "labels" / f"{dataset.files[0].stem}.txt").write_text(line, encoding="utf-8")
    with pytest.raises(DatasetError, match=text):
        dataset[0]


def test_yolo_polygons_become_boxes_and_repeated_lines_count_once(yolo: Path) -> None:
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
        ("just words", "'train', 'val'"),
        ("val: images", "'names' should be"),
        ("val: images\nnames: {1: a, 2: b}", "'names' should be"),
        ("train: images\nnames: [a]", "has no 'val'"),
        ("val: elsewhere\nnames: [a]", "elsewhere is missing"),
        ("val: pictures\nnames: [a]", "none of the 4 images"),
    ],
)
def test_broken_yaml_is_refused(yolo: Path, images: Path, content: str, text: str) -> None:
    shutil.copytree(images, yolo.parent / "pictures")
    yolo.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=text):
        YoloDataset(yolo, "val")


def test_yaml_with_root_list_and_text_file_is_read(yolo: Path, images: Path) -> None:
    names = sorted(path.name for path in images.iterdir())
    (yolo.parent / "some.txt").write_text("\n".join(f"./images/{name}" for name in names[:2]), encoding="utf-8")
    head = f"path: {yolo.parent}\nnames: {{{', '.join(f'{digit}: d{digit}' for digit in range(10))}}}\n"
    yolo.write_text(f"{head}val: [some.txt, ../images]\n", encoding="utf-8")
    assert len(YoloDataset(yolo, "val")) == 2 + 4
    assert issubclass(DatasetError, FxpruneError)


def test_detector_with_too_few_classes_is_refused(yolo: Path) -> None:
    model = open_model(ModelOptions("torchvision:ssdlite320_mobilenet_v3_large", classes=5), "cpu")
    with pytest.raises(SettingError, match=r"1 to 4 .* 10; .*--classes 11"):
        open_images(model, DataOptions(data=yolo), "val")
