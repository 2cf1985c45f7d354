"""Detections of ultralytics models compared with those of ultralytics' own `val`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import fxprune
from fxprune import CocoDataset, ModelError, SettingError
from fxprune.adapters.protocol import Batch
from fxprune.adapters.ultralytics.adapter import ADAPTER, square_side
from fxprune.adapters.ultralytics.letterbox import compute_placement

ultralytics = pytest.importorskip("ultralytics")
from ultralytics.models.rtdetr.val import RTDETRValidator  # noqa: E402
from ultralytics.models.yolo.detect import DetectionValidator  # noqa: E402

SHAPES = ((90, 160), (200, 121), (64, 64), (333, 77), (75, 100))  # height, width
COUNT, SIDE, BATCH = 20, 96, 4
NAMES = {number: f"thing {number}" for number in range(8)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    """Shapes on noise, their outlines as truth in COCO's format and in ultralytics'; label = 100 + class."""
    folder, draw = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number in range(COUNT):
        height, width = SHAPES[number % len(SHAPES)]
        images.append({"id": number + 1, "file_name": f"{number:02}.png", "height": height, "width": width})
        image = Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
        lines = []
        for cell in range(4):  # one box a quarter, so that none overlaps another
            label, share = int(draw.integers(len(NAMES))), draw.uniform((0, 0, 0.4, 0.4), (0.3, 0.3, 0.7, 0.7)) / 2
            x, y = (share[0] + cell % 2 / 2) * width, (share[1] + cell // 2 / 2) * height
            w, h = share[2] * width, share[3] * height
            ImageDraw.Draw(image).rectangle((x, y, x + w, y + h), fill=tuple(draw.integers(0, 255, 3)))
            annotations.append({"image_id": number + 1, "category_id": 100 + label, "bbox": [x, y, w, h]})
            numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join(map(str, (label, *numbers))))
        image.save(folder / "images" / images[-1]["file_name"])
        (folder / "labels" / f"{number:02}.txt").write_text("\n".join(lines))
    categories = [{"id": 100 + number, "name": name} for number, name in NAMES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    settings = {"path": str(folder), "train": "images", "val": "images", "names": NAMES}
    (folder / "data.yaml").write_text(json.dumps(settings))
    return CocoDataset.from_folder(folder)


def make(name: str, kind: str = "YOLO") -> Any:
    """A model of eight classes from its YAML."""
    torch.manual_seed(0)
    model = getattr(ultralytics, kind)(f"{name}.yaml")
    model.model = type(model.model)(f"{name}.yaml", nc=len(NAMES), verbose=False)
    model.model.names = NAMES
    return model


def awake(model: Any, data: CocoDataset) -> Any:
    """Give a network with random weights boxes and scores that depend on the image: norms that fit, a livelier head."""
    network, generator = model.model, torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        network.train()(ADAPTER.collate(network, [image for image, _ in data], None, SIDE)["img"])
        for name, layer in network.model[-1].named_modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                spread = 0.15 if "cv3" in name else 0.03  # scores, sides of boxes
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)
                layer.bias.fill_(-3 if "cv3" in name else 2)
    return model


def validate(model: Any, data: CocoDataset, out: Path, **options: Any) -> tuple[list[list[dict[str, Any]]], Any]:
    """ultralytics' own detections, image by image, and its metrics; the model is fused in place."""
    base = RTDETRValidator if isinstance(model, ultralytics.RTDETR) else DetectionValidator
    quiet = type("Validator", (base,), {"eval_json": lambda self, stats: stats})  # else it installs a package
    threads = torch.get_num_threads()
    metrics = model.val(
        validator=quiet, data=str(Path(str(data.images)).parent / "data.yaml"), imgsz=SIDE, batch=BATCH, rect=False,
        save_json=True, workers=0, plots=False, device="cpu", verbose=False, project=str(out), **options,
    )  # fmt: skip
    torch.set_num_threads(threads)
    rows = json.loads((Path(metrics.save_dir) / "predictions.json").read_text())
    return [[row for row in rows if row["image_id"] == number] for number in range(COUNT)], metrics


def detections(model: Any, data: CocoDataset) -> list[dict[str, Tensor]]:
    images, network = [image for image, _ in data], model.model.eval()
    return [
        found for start in range(0, COUNT, BATCH) for found in ADAPTER.detect(network, images[start:][:BATCH], SIDE)
    ]


def assert_same(ours: list[dict[str, Tensor]], theirs: list[list[dict[str, Any]]]) -> None:
    """Every box of theirs is one of ours, but for one in a hundred: rounding decides at the edge of suppression."""
    total, missed = 0, 0
    for found, rows in zip(ours, theirs, strict=True):
        assert abs(len(rows) - len(found["labels"])) <= 2
        for row in rows:
            left, top, width, height = row["bbox"]
            near = (found["boxes"] - torch.tensor([left, top, left + width, top + height])).abs().amax(1) < 0.02
            near &= found["labels"] + 1 == row["category_id"]  # theirs count from 1
            near &= (found["scores"] - row["score"]).abs() < 2e-4
            total, missed = total + 1, missed + (not bool(near.any()))
    assert total > 1000
    assert missed <= total / 100


@pytest.mark.parametrize(
    ("name", "end2end"), [("yolov8n", False), ("yolo26n", True), ("yolo26n", False), ("yolov10n", True)]
)
def test_detections_equal_those_of_val(name: str, end2end: bool, data: CocoDataset, tmp_path: Path) -> None:
    model = awake(make(name), data)
    model.model.end2end = end2end
    theirs, _ = validate(model, data, tmp_path, nms=False if end2end else None)
    assert model.model.end2end == end2end
    assert_same(detections(model, data), theirs)


@pytest.mark.slow
def test_detections_of_a_query_decoder_equal_those_of_val(data: CocoDataset, tmp_path: Path) -> None:
    model = make("rtdetr-l", "RTDETR")
    theirs, _ = validate(model, data, tmp_path)
    assert_same(detections(model, data), theirs)


class Puppet:
    """What stands in for a network's layers: prepared boxes for every image, good ones, poor ones and wrong ones."""

    def __init__(self, network: nn.Module, data: CocoDataset, perfect: bool = False) -> None:
        self.answers: dict[float, Tensor] = {}
        draw = torch.Generator().manual_seed(0)
        for image, target in data:
            square = ADAPTER.collate(network, [image], None, SIDE)["img"][0]
            boxes = compute_placement(image.shape[-2], image.shape[-1], SIDE, False).to_square(target["boxes"])
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            moved = boxes if perfect else boxes + sides * 0.1 * torch.randn(boxes.shape, generator=draw)
            answer = torch.zeros(4 + len(NAMES), 21)
            answer[:4, :4] = torch.cat([(moved[:, :2] + moved[:, 2:]) / 2, moved[:, 2:] - moved[:, :2]], 1).T
            wrong = torch.rand(4, generator=draw) < (0 if perfect else 0.2)
            classes = (target["labels"] - 100 + wrong) % len(NAMES)
            answer[4 + classes, torch.arange(4)] = 0.3 + 0.7 * torch.rand(4, generator=draw)
            self.answers[self.key(square)] = answer

    @staticmethod
    def key(square: Tensor) -> float:
        return round(float(square.double().sum()), 3)

    def __call__(self, images: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        empty = torch.zeros(4 + len(NAMES), 21)
        return torch.stack([self.answers.get(self.key(image), empty) for image in images]), None


def test_map_is_close_to_map_of_val(data: CocoDataset, tmp_path: Path) -> None:
    model = make("yolov8n")
    model.model.predict = Puppet(model.model, data)
    _, metrics = validate(model, data, tmp_path)
    scores = fxprune.evaluate(model, data, image_size=SIDE)
    assert 0.2 < scores["mAP"] < 0.9
    # COCO averages the best precision at no less than each of 101 recalls; ultralytics draws straight lines between
    # the points of the curve and integrates: here that is a few thousandths.
    assert metrics.box.map == pytest.approx(scores["mAP"], abs=0.01)
    assert metrics.box.map50 == pytest.approx(scores["mAP50"], abs=0.01)


def test_evaluate_of_true_boxes_gives_one_and_restores_the_model(data: CocoDataset) -> None:
    model = make("yolov8n")
    model.model.predict = Puppet(model.model, data, perfect=True)
    model.model.train().model[0].eval()
    modes = [module.training for module in model.model.modules()]
    scores = fxprune.evaluate(model, data, image_size=90)  # rounded up to 96
    assert scores["mAP"] > 0.99  # the pixels of the letterbox are whole numbers, the boxes float32
    assert [module.training for module in model.model.modules()] == modes
    shifted = {number: 100 + (number + 1) % 8 for number in NAMES}
    assert fxprune.evaluate(model, data, image_size=SIDE, labels=shifted)["mAP"] < 0.1
    model.model.names = {number: str(number) for number in NAMES}
    with pytest.raises(SettingError, match=r"no class.*thing 0"):
        fxprune.evaluate(model, data)
    same = {number: 100 + number for number in NAMES}
    assert fxprune.evaluate(model, data, image_size=SIDE, labels=same)["mAP"] == scores["mAP"]
    assert 0.8 < fxprune.evaluate(model, data, image_size=SIDE, labels={0: 100})["mAP"] * 8 <= 1.01


def test_network_can_be_trained_after_evaluate(data: CocoDataset) -> None:
    network = make("yolov8n").model
    fxprune.evaluate(network, data, image_size=SIDE, batch_size=COUNT)
    (batch,) = fxprune.batches(network, data, batch_size=COUNT, image_size=SIDE)
    ADAPTER.prepare(network)
    loss = ADAPTER.loss(network, ADAPTER.normalize(network, batch)).sum()  # its anchors were kept from the evaluation
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(network.model[0].conv.weight.grad.abs().sum()) > 0


class Queries(nn.Module):
    """A network of one layer that decodes queries: boxes come as shares of the image, centre and sides."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.names, self.nc, self.stride = NAMES, len(NAMES), torch.tensor([32.0])
        self.model = nn.Sequential(nn.Identity())
        self.model[0].num_queries = len(rows)  # type: ignore[assignment]
        self.register_buffer("rows", torch.tensor(rows))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.rows.expand(len(images), -1, -1), None  # type: ignore[operator]


def test_normalized_boxes_are_scaled_to_the_image() -> None:
    network = Queries([[0.5, 0.25, 0.2, 0.1, 0.9, 3.0], [0.1, 0.1, 0.1, 0.1, 0.0005, 1.0]])
    labelled = ADAPTER.label(network, Batch(torch.rand(2, 3, 64, 96), None, 2)).targets
    assert labelled["bboxes"].flatten().tolist() == pytest.approx([0.5, 0.25, 0.2, 0.1] * 2)
    assert labelled["cls"].flatten().tolist() == [3, 3]
    assert labelled["batch_idx"].tolist() == [0, 1]
    (found,) = ADAPTER.detect(network, [torch.rand(3, 100, 200)], 64)
    assert found["boxes"].flatten().tolist() == pytest.approx([80, 20, 120, 30], abs=1e-4)
    assert found["labels"].tolist() == [3]


def test_square_side_is_the_training_size_or_640(data: CocoDataset) -> None:
    network = make("yolov8n").model
    assert square_side(network, None) == 640
    network.args = {"imgsz": 330}
    assert (square_side(network, None), square_side(network, 64)) == (352, 64)
    with pytest.raises(SettingError, match="image_size is 0"):
        fxprune.evaluate(network, data, image_size=0)


@pytest.mark.parametrize(("name", "said"), [("yolov8n-obb", "rotated boxes"), ("yolov8n-cls", "give a detector")])
def test_evaluate_of_a_model_without_upright_boxes_is_refused(name: str, said: str, data: CocoDataset) -> None:
    model = ultralytics.YOLO(f"{name}.yaml")
    model.model.names = NAMES
    with pytest.raises(ModelError, match=said):
        fxprune.evaluate(model, data, image_size=SIDE)
