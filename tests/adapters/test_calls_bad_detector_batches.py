"""Invalid batches for torchvision detectors and ultralytics models are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

import fxprune
from fxprune import BatchError
from tests.helpers.hostile import assert_refused, assert_unchanged
from tests.helpers.models import Block, pixels

# Torchvision detectors -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ssd() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    return built.eval()


@pytest.fixture(scope="module")
def retinanet() -> nn.Module:
    """Torchvision's own class around a small backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), *(Block(8) for _ in range(3)))
        backbone.out_channels = 8  # type: ignore[assignment]
        anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
        head = detection.retinanet.RetinaNetHead(8, 2, 5)
        built = detection.RetinaNet(backbone, 5, min_size=64, max_size=96, anchor_generator=anchors, head=head)
    return built.eval()


def target(label: int = 1, box: tuple[float, ...] = (8.0, 8.0, 40.0, 40.0)) -> dict[str, Tensor]:
    return {"boxes": torch.tensor([box]), "labels": torch.tensor([label])}


def no_boxes() -> dict[str, Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize(
    "batch",
    [
        {"img": pixels(1, 3, 64, 64)},
        "cat.jpg",
        3,
        np.zeros((1, 3, 64, 64), np.float32),
        [np.zeros((3, 64, 64), np.float32)],
        pixels(3, 64, 64),
        (pixels(1, 3, 64, 64), torch.tensor([1])),
        ([pixels(3, 64, 64)], [{"boxes": torch.zeros(0, 4)}]),
        ([pixels(3, 64, 64)], [{"bbox": torch.zeros(0, 4), "category_id": torch.zeros(0)}]),
        ([pixels(3, 64, 64)], [[{"bbox": [1, 2, 3, 4], "category_id": 1}]]),
    ],
    ids=["dict", "string", "number", "array", "arrays", "image", "class labels", "no labels", "other keys", "coco"],
)
def test_torchvision_batch_of_unknown_form_is_refused(ssd: nn.Module, batch: Any) -> None:
    with assert_refused(ssd, BatchError, r"^batch 0: .*Tensor\(3, H, W\).*dict\(boxes="):
        fxprune.compile(ssd, [batch], 0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (target(-1), "label -1 is negative"),
        (target(box=(40, 8, 40, 40)), "positive width"),
        (target(box=(40, 8, 8, 40)), "positive width"),
        (target(box=(float("nan"), 8, 40, 40)), "NaN|positive width"),
        (target(box=(8, 8, float("inf"), 40)), "NaN|infinit"),
        (target(box=(8, 8, 40, 40, 1)), r"boxes .*\(1, 5\)"),
        (target() | {"labels": torch.tensor([1, 2])}, "1 boxes but 2 labels"),
        (target() | {"boxes": "everywhere"}, "boxes"),
        (target() | {"labels": ["cat"]}, "labels"),
    ],
    ids=["negative", "no width", "corners swapped", "NaN", "infinite", "five", "counts", "text", "names"],
)
def test_torchvision_batch_with_bad_targets_is_refused(ssd: nn.Module, labels: Any, message: str) -> None:
    with assert_refused(ssd, BatchError, f"^batch 0: .*({message})"):
        fxprune.compile(ssd, [([pixels(3, 64, 64)], [labels])], 0.1)


def test_torchvision_batch_with_more_images_than_targets_is_refused(ssd: nn.Module) -> None:
    with assert_refused(ssd, BatchError, "^batch 0: 2 images but 1 targets"):
        fxprune.compile(ssd, [([pixels(3, 64, 64)] * 2, [target()])], 0.1)


@pytest.mark.parametrize(("name", "label"), [("ssd", 5), ("retinanet", 5), ("retinanet", 91)])
def test_torchvision_batch_with_unknown_labels_is_refused(
    name: str, label: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    batch = ([pixels(3, 64, 64)] * 2, [target(1), target(label)])
    with assert_refused(model, BatchError, f"^batch 0: .*labels .*1 to {label}"):
        fxprune.compile(model, [batch], 0.1)


def test_torchvision_batch_with_a_non_finite_image_is_refused(ssd: nn.Module) -> None:
    image = pixels(3, 64, 64)
    image[0, 0, 0] = float("nan")
    with assert_refused(ssd, BatchError, "^batch 0: .*image .*NaN"):
        fxprune.compile(ssd, [([pixels(3, 64, 64), image], [target(), target()])], 0.1)


def test_torchvision_batch_without_images_is_refused(ssd: nn.Module) -> None:
    with assert_refused(ssd, BatchError, "^batch 0: .*no image"):
        fxprune.compile(ssd, [([], [])], 0.1)


def test_label_out_of_range_in_a_later_batch_names_the_batch(retinanet: nn.Module) -> None:
    batches = [([pixels(3, 64, 64)], [target(4)]), ([pixels(3, 64, 64)], [target(7)])]
    with assert_refused(retinanet, BatchError, "^batch 1: .*labels .*7 to 7"):
        fxprune.compile(retinanet, batches, 0.1)


@pytest.mark.filterwarnings("ignore:the labels of 1 image have no box:fxprune.FxpruneWarning")
@pytest.mark.filterwarnings("ignore:the model finds next to nothing in 1 image:fxprune.FxpruneWarning")
@pytest.mark.parametrize(
    "batch",
    [
        ([pixels(3, 64, 96), pixels(3, 80, 64)], [target(), target(2)]),
        ([pixels(3, 64, 64)], [target(4)]),
        ([pixels(3, 64, 64), pixels(3, 64, 64)], [target(), no_boxes()]),
        ([pixels(3, 64, 64)], [no_boxes()]),
        ([pixels(3, 64, 64)], [{"boxes": torch.zeros(0), "labels": torch.zeros(0)}]),
        [pixels(3, 64, 64)],
        pixels(1, 3, 64, 64),
        ((pixels(3, 64, 64),), ({"boxes": [[8, 8, 40, 40]], "labels": [1]},)),
    ],
    ids=["mixed sizes", "one", "one without boxes", "no boxes", "flat", "images", "tensor", "lists"],
)
def test_torchvision_batches_of_accepted_forms_work(retinanet: nn.Module, batch: Any) -> None:
    with assert_unchanged(retinanet):
        analysis = fxprune.analyze(retinanet, [batch])
    assert analysis.settings["images"] == (2 if len(batch) == 2 and len(batch[0]) == 2 else 1)
    assert {"backbone.1", "backbone.2", "backbone.3"} <= {region.name for region in analysis.regions if region.score}


# Ultralytics ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yolo() -> Any:
    ultralytics = pytest.importorskip("ultralytics")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ultralytics.YOLO("yolov8n.yaml")


def boxes(**changed: Any) -> dict[str, Any]:
    batch = {
        "img": pixels(2, 3, 64, 64),
        "cls": torch.tensor([[3.0], [7.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.4, 0.5, 0.2, 0.6]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    return {key: value for key, value in (batch | changed).items() if value is not None}


@pytest.mark.parametrize(
    "batch",
    [
        {"images": pixels(1, 3, 64, 64)},
        "cat.jpg",
        3,
        np.zeros((1, 3, 64, 64), np.float32),
        pixels(3, 64, 64),
        (pixels(1, 3, 64, 64), torch.tensor([1])),
        ([pixels(3, 64, 64)], [target()]),
        boxes(cls=None),
        boxes(img=["cat.jpg", "dog.jpg"]),
    ],
    ids=["other keys", "string", "number", "array", "image", "class labels", "torchvision", "no cls", "paths"],
)
def test_ultralytics_batch_of_unknown_form_is_refused(yolo: Any, batch: Any) -> None:
    with assert_refused(yolo, BatchError, r"^batch 0: .*dict\(img=.*cls=.*bboxes="):
        fxprune.compile(yolo, [batch], 0.1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (boxes(cls=torch.tensor([[3.0], [80.0]])), r"cls .*3 to 80, .*0 to 79"),
        (boxes(cls=torch.tensor([[-1.0], [3.0]])), r"cls .*-1 to 3, .*0 to 79"),
        (boxes(cls=torch.tensor([[3.0]])), "1 cls, 2 bboxes and 2 batch_idx"),
        (boxes(batch_idx=torch.tensor([0.0, 2.0])), r"batch_idx .*to 2, .*2 images"),
        (boxes(batch_idx=torch.tensor([-1.0, 1.0])), r"batch_idx .*-1 .*2 images"),
        (boxes(bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 2)), r"bboxes leave \[0, 1\]"),
        (boxes(bboxes=torch.tensor([[0.5, 0.5, 0.0, 0.4]] * 2)), "positive width"),
        (boxes(bboxes=torch.tensor([[0.5, 0.5, float("nan"), 0.4]] * 2)), "NaN"),
        (boxes(bboxes=torch.tensor([[0.5, 0.5, 0.2, 0.4, 0.1]] * 2)), r"bboxes .*\(2, 5\)"),
        (boxes(cls=[3, 7]), "cls .*list"),
        (boxes(bboxes=[[0.5, 0.5, 0.2, 0.2]] * 2), "bboxes .*list"),
        (boxes(img=[pixels(3, 64, 96), pixels(3, 64, 64)]), r"one size .*\(3, 64, 64\), \(3, 64, 96\)"),
        (boxes(img=torch.full((2, 3, 64, 64), float("nan"))), "image .*NaN"),
        (boxes(img=pixels(0, 3, 64, 64)), "no image"),
    ],
    ids=[
        *("label too high", "label negative", "counts", "index too high", "index negative", "pixels", "no width"),
        *("NaN box", "five", "list of cls", "list of boxes", "mixed sizes", "NaN image", "no image"),
    ],
)
def test_ultralytics_batch_with_bad_targets_is_refused(yolo: Any, batch: Any, message: str) -> None:
    with assert_refused(yolo, BatchError, f"^batch 0: .*{message}"):
        fxprune.compile(yolo, [batch], 0.1)


def test_ultralytics_batches_of_one_image_and_without_boxes_work(yolo: Any) -> None:
    empty = boxes(cls=torch.zeros(0, 1), bboxes=torch.zeros(0, 4), batch_idx=torch.zeros(0))
    one = boxes(img=pixels(1, 3, 64, 64), batch_idx=torch.zeros(2))
    with assert_unchanged(yolo):
        analysis = fxprune.analyze(yolo, [empty, one])
    assert (analysis.settings["images"], analysis.settings["batches"]) == (3, 2)
    scores = {region.name: region.score for region in analysis.regions if not region.name.startswith("model.22")}
    assert len(scores) > 20
    assert min(scores.values()) > 0
