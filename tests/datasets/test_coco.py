"""COCO-format data: items, errors, and calibration batches for torchvision and ultralytics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset
from torchvision.models import resnet18

import fxprune
from fxprune import BatchError, CocoDataset, DatasetError, FxpruneWarning, ModelError, SettingError
from fxprune.adapters.ultralytics.letterbox import letterbox
from fxprune.demo.bundled import load_dataset, load_detector

SIZES = ((40, 60), (64, 32))  # height, width


def example() -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [10, 5, 20, 30], "area": 400.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 60, 40], "area": 2000, "iscrowd": 1},
            {"id": 3, "image_id": 9, "category_id": 3, "bbox": [1, 2, 3, 4]},
        ],
    }


def write(folder: Path, content: Any) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    for name, (height, width) in zip("ab", SIZES, strict=True):
        pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    (folder / "annotations.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def opened(folder: Path, content: Any, **options: Any) -> CocoDataset:
    return CocoDataset.from_folder(write(folder, content), **options)


class Named(nn.Module):
    """A model of torchvision's convention that says what its classes are called."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names


def test_coco_item_has_image_boxes_and_labels(tmp_path: Path) -> None:
    data = opened(tmp_path, example())
    image, target = data[0]
    stored = np.asarray(Image.open(tmp_path / "images" / "a.png"))
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(stored.copy()).permute(2, 0, 1))
    assert image.dtype == torch.float32
    assert target["boxes"].tolist() == [[10, 5, 30, 35], [0, 0, 60, 40]]
    assert target["labels"].tolist() == [5, 3]
    assert target["area"].tolist() == [400.5, 2000]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["image_id"] == 7
    assert data[1][1]["area"].tolist() == [12]  # none in the file: the box's
    assert data.categories == {3: "cat", 5: "dog"}
    assert len(data) == 2


def test_coco_dataset_takes_string_paths_and_a_limit(tmp_path: Path) -> None:
    write(tmp_path, example())
    data = CocoDataset(str(tmp_path / "images"), str(tmp_path / "annotations.json"), limit=1)
    assert len(data) == 1
    with pytest.raises(DatasetError, match="limit is 0"):
        CocoDataset.from_folder(tmp_path, limit=0)


def test_coco_item_without_boxes_and_grey_image_are_read(tmp_path: Path) -> None:
    content = example() | {"annotations": []}
    data = opened(tmp_path, content)
    Image.new("L", (60, 40), 51).save(tmp_path / "images" / "a.png")
    image, target = data[0]
    assert target["boxes"].shape == (0, 4)
    assert image.shape == (3, 40, 60)
    assert image.flatten().tolist() == pytest.approx([0.2] * image.numel())


def test_boxes_without_size_are_dropped_and_counted(tmp_path: Path) -> None:
    content = example()
    content["annotations"][0]["bbox"] = [10, 5, 0, 30]
    content["annotations"][2]["bbox"] = [10, 5, 4, -1]
    with pytest.warns(FxpruneWarning, match=r"2 box\(es\) .*annotation 1 \(image 7"):
        data = opened(tmp_path, content)
    assert data[0][1]["labels"].tolist() == [3]
    assert data[1][1]["labels"].tolist() == []


def changed(part: str, number: int, **values: Any) -> dict[str, Any]:
    content = example()
    content[part][number].update(values)
    return content


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", r"annotations.json cannot be read as JSON"),
    "a list": ([], r"no list 'images'"),
    "no categories": ({key: example()[key] for key in ("images", "annotations")}, "no list 'categories'"),
    "absent image": (changed("annotations", 2, image_id=8), "annotation 3 has image 8"),
    "unknown category": (changed("annotations", 2, category_id=4), "annotation 3 has the category 4"),
    "no numbers": (changed("annotations", 1, bbox=["x", 0, 1, 1]), "annotation 2 has a wrong number"),
    "three numbers": (changed("annotations", 1, bbox=[0, 1, 1]), "annotation 2 has a wrong number"),
    "infinity": (changed("annotations", 1, bbox=[0, 0, float("inf"), 1]), "annotation 2 contains NaN or infinity"),
    "no box": (example() | {"annotations": [{"id": 4, "image_id": 7}]}, "annotation 4 lacks .*'bbox'"),
    "two images of one id": (changed("images", 1, id=7), "two images have the id 7"),
    "two categories of one id": (changed("categories", 1, id=3), "two categories have the id 3"),
    "an image without a name": (example() | {"images": [{"id": 7}]}, "image 0 is .*'file_name'"),
    "a category without a name": (example() | {"categories": [{"id": 3}]}, "category 0 is"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotations_are_refused_by_name(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    with pytest.raises(DatasetError, match=message):
        opened(tmp_path, content)


def test_missing_and_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="images is no folder"):
        CocoDataset.from_folder(tmp_path)
    data = opened(tmp_path, example())
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.png is missing: image 7"):
        data[0]
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"b\.png, image 9, cannot be read"):
        data[1]
    Image.new("RGB", (40, 60)).save(tmp_path / "images" / "a.png")
    with pytest.raises(DatasetError, match=r"40 x 60 .*60 x 40"):
        data[0]
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(DatasetError, match=r"annotations\.json is missing"):
        CocoDataset.from_folder(tmp_path)


def test_torchvision_batches_leave_crowds_out(tmp_path: Path) -> None:
    batches = fxprune.batches(load_detector(), opened(tmp_path, example()), batch_size=2)
    ((images, targets),) = batches
    assert [tuple(image.shape) for image in images] == [(3, *size) for size in SIZES]
    assert [target["boxes"].tolist() for target in targets] == [[[10, 5, 30, 35]], [[1, 2, 4, 6]]]
    assert [target["labels"].tolist() for target in targets] == [[5], [3]]
    assert len(list(batches)) == len(list(batches)) == 1  # read as often as one likes


def test_batches_use_the_class_numbers_of_the_model(tmp_path: Path) -> None:
    data = opened(tmp_path, example())
    by_name = fxprune.batches(Named("bird", "dog", "cat"), data, batch_size=1)
    assert [batch[1][0]["labels"].tolist() for batch in by_name] == [[1], [2]]
    ((_, targets),) = fxprune.batches(Named("a", "b"), data, labels={0: 3, 1: 5})
    assert [target["labels"].tolist() for target in targets] == [[1], [0]]
    with pytest.raises(SettingError, match=r"item 0 .* label 5"):
        fxprune.batches(Named("a", "b"), data, labels={0: 3})[0]
    with pytest.raises(SettingError, match=r"0 and 1 .*label 3"):
        fxprune.batches(Named("a", "b"), data, labels={0: 3, 1: 3})


def test_batches_refuses_unmatched_class_names(tmp_path: Path) -> None:
    data = opened(tmp_path, example())
    for source in (data, Subset(data, [1])):
        with pytest.raises(SettingError, match=r"no class .*{5: 'dog'}.*labels="):
            fxprune.batches(Named("cat", "hound"), source)
    with pytest.raises(SettingError, match="class 0 to label 4"):
        fxprune.batches(Named("a"), data, labels={0: 4})
    with pytest.raises(SettingError, match="labels has class 1"):
        fxprune.batches(Named("a"), data, labels={1: 3})


def test_yolo_batches_have_boxes_on_the_objects(tmp_path: Path) -> None:
    ultralytics = pytest.importorskip("ultralytics")
    colours = {3: (255, 0, 0), 5: (0, 255, 0)}
    content = example()
    content["annotations"].pop(1)
    data = opened(tmp_path, content)
    for name, (height, width), entry in zip("ab", SIZES, content["annotations"], strict=True):
        image = Image.new("RGB", (width, height))
        x, y, w, h = entry["bbox"]
        image.paste(colours[entry["category_id"]], (x, y, x + w, y + h))
        image.save(tmp_path / "images" / f"{name}.png")
    model = ultralytics.YOLO("yolov8n.yaml")
    model.model.names = dict(enumerate(("dog", "cat", *map(str, range(78)))))
    (batch,) = fxprune.batches(model, data, image_size=310)  # rounded up to 320, five times the longer sides
    assert batch["img"].shape == (2, 3, 320, 320)
    assert batch["cls"].tolist() == [[0], [1]]
    assert batch["batch_idx"].tolist() == [0, 1]
    placed = ((1, (0, 53), 320 / 60), (0, (80, 0), 5))  # colour channel, pad left and above, scale
    for index, (channel, (left, top), scale) in enumerate(placed):
        x, y, w, h = content["annotations"][index]["bbox"]
        corners = [x * scale + left, y * scale + top, (x + w) * scale + left, (y + h) * scale + top]
        centre_x, centre_y, width, height = (batch["bboxes"][index] * 320).tolist()
        assert [centre_x - width / 2, centre_y - height / 2] == pytest.approx(corners[:2], abs=0.5)
        assert [centre_x + width / 2, centre_y + height / 2] == pytest.approx(corners[2:], abs=0.8)
        inside = (batch["img"][index, channel] > 0.6).nonzero()  # pixels of the object itself
        seen = [*inside.amin(0).flip(0).tolist(), *(inside.amax(0) + 1).flip(0).tolist()]
        assert seen == pytest.approx(corners, abs=1.5)
    (alone,) = fxprune.batches(model, data, image_size=320, targets=False)
    assert list(alone) == ["img"]
    assert torch.equal(alone["img"], batch["img"])
    content["annotations"][0]["bbox"] = [70, 0, 5, 5]
    with pytest.raises(BatchError, match=r"box \[70.*image 7 .*60 x 40"):
        fxprune.batches(model, opened(tmp_path, content))[0]


def test_letterbox_pads_with_grey_and_can_be_undone() -> None:
    square, placement = letterbox(torch.ones(3, 50, 100), 64)
    assert (placement.resized, placement.pad) == ((32, 64), (0, 16))
    assert torch.equal(square[:, 16:48], torch.ones(3, 32, 64))
    assert torch.equal(square[:, :16], torch.full((3, 16, 64), 114 / 255))
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0]])
    assert torch.allclose(placement.to_image(placement.to_square(boxes)), boxes, atol=1e-4)
    stretched, placement = letterbox(torch.ones(3, 50, 100), 64, stretch=True)
    assert torch.equal(stretched, torch.ones(3, 64, 64))
    assert placement.to_square(boxes).tolist() == [pytest.approx([0.64, 2.56, 19.2, 51.2])]


def test_batches_calibrate_torchvision_and_ultralytics(tmp_path: Path) -> None:
    ultralytics = pytest.importorskip("ultralytics")
    val = Subset(load_dataset("calibration"), range(2))
    analysis = fxprune.analyze(load_detector(), fxprune.batches(load_detector(), val))
    model = ultralytics.nn.tasks.DetectionModel("yolov8n.yaml", nc=10, verbose=False)
    other = fxprune.analyze(model, fxprune.batches(model, val, image_size=64))  # digits are named as classes are
    assert analysis.regions
    assert other.regions


def test_batches_refuses_unusable_data_sets(tmp_path: Path) -> None:
    data = opened(tmp_path, example())
    with pytest.raises(ModelError, match=r"ResNet .*boxes"):
        fxprune.batches(resnet18(), data)
    with pytest.raises(BatchError, match="batch_size is 0"):
        fxprune.batches(load_detector(), data, batch_size=0)
    with pytest.raises(BatchError, match="data set is empty"):
        fxprune.batches(load_detector(), [])
    with pytest.raises(BatchError, match=r"Item 0 .*is not"):
        fxprune.batches(load_detector(), [(torch.zeros(3, 8, 8), {"labels": torch.zeros(1)})])[0]
