"""Adapter of ultralytics models: `DetectionModel` and similar classes, and the `YOLO` object that wraps one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch, check_image, confidence_threshold, device_of, stack_images
from fxprune.adapters.ultralytics_decoding import (
    BOX_COLUMNS,
    best_scores,
    count_classes,
    decode_output,
    has_queries,
    suppress_overlaps,
)
from fxprune.adapters.ultralytics_letterbox import Placement, clip, letterbox, match_channels
from fxprune.errors import BatchError, ModelError, SettingError
from fxprune.graph.fx_utils import class_names

FORMS = (
    "dict(img=Tensor(N, 3, H, W), cls=Tensor(n, 1), bboxes=Tensor(n, 4) xywh in [0, 1], batch_idx=Tensor(n)),"
    " or images alone as dict(img=...) or Tensor(N, 3, H, W)"
)
CONFIDENCE_THRESHOLD = 0.25
"""Least score of outputs that serve as labels (ultralytics' own prediction threshold)."""
IMAGE_SIZE = 640
"""Side of the square, in pixels, if a model does not store its training size (ultralytics' default)."""


def is_yolo(model: nn.Module) -> bool:
    """Whether the model is a `YOLO` object, or a similar one, that wraps a network."""
    return "ultralytics.engine.model.Model" in class_names(model)


def unwrap_yolo(model: nn.Module) -> nn.Module:
    """Return the network inside a `YOLO` object.

    Raises
    ------
    ModelError
        If the object holds an exported model and no network.
    """
    network = cast(Any, model).model
    if not isinstance(network, nn.Module):
        raise ModelError(f"this {type(model).__name__} holds {network!r}, not a PyTorch network; load the .pt or .yaml")
    return network


def rewrap_yolo(model: nn.Module, network: nn.Module) -> nn.Module:
    """Return a copy of a `YOLO` object with another network and without the predictor, trainer and metrics."""
    twin = copy.copy(model)
    twin.__dict__ = {key: copy.copy(value) for key, value in model.__dict__.items()}
    twin.__dict__.update(predictor=None, trainer=None, metrics=None)
    cast(Any, twin).model = network
    return twin


def prepare(model: nn.Module) -> None:
    """Set what the loss reads and ultralytics' trainer would set: the loss gains and the number of classes."""
    from ultralytics.cfg import get_cfg

    network = cast(Any, model)
    known = dict(get_cfg())
    given = getattr(network, "args", None) or {}
    settings = given if isinstance(given, Mapping) else vars(given)
    network.args = get_cfg(overrides={key: value for key, value in settings.items() if key in known})
    network.criterion = None
    if not hasattr(network, "nc"):
        network.nc = len(network.names)


def normalize(model: nn.Module, raw: Any) -> Batch:
    """Convert a raw batch in one of the `FORMS` to a `Batch` on the model's device."""
    device = device_of(model)
    if not isinstance(raw, Mapping):
        images = raw[0] if isinstance(raw, (list, tuple)) and len(raw) == 1 else raw
        raw = {"img": images}
    if "img" not in raw:
        raise BatchError(f"the batch has keys {sorted(map(str, raw))} and no 'img'; known forms: {FORMS}")
    images = stack_images(raw["img"], FORMS).to(device)
    missing = {"cls", "bboxes", "batch_idx"} - set(raw)
    if missing == {"cls", "bboxes", "batch_idx"}:
        return Batch(images, None, len(images))
    if missing:
        raise BatchError(f"the batch lacks {sorted(missing)}; known forms: {FORMS}")
    targets = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in raw.items()}
    _check_targets(model, targets, len(images))
    return Batch(images, targets | {"img": images}, len(images))


def _check_targets(model: nn.Module, targets: Mapping[str, Any], count: int) -> None:
    for key in ("cls", "bboxes", "batch_idx"):
        if not isinstance(targets[key], Tensor):
            raise BatchError(f"{key} should be a tensor, got {type(targets[key]).__name__}; known forms: {FORMS}")
    if targets["bboxes"].numel() and (targets["bboxes"].ndim != 2 or targets["bboxes"].shape[1] != 4):
        raise BatchError(f"bboxes have shape {tuple(targets['bboxes'].shape)}; they are (n, 4), xywh in [0, 1]")
    classes, boxes, index = targets["cls"].reshape(-1), targets["bboxes"], targets["batch_idx"].reshape(-1)
    if not len(classes) == len(boxes) == len(index):
        raise BatchError(f"{len(classes)} cls, {len(boxes)} bboxes and {len(index)} batch_idx should be equally many")
    if not len(classes):
        return
    known = len(getattr(model, "names", ())) or int(getattr(model, "nc", 0)) or int(classes.max()) + 1
    if int(classes.min()) < 0 or int(classes.max()) >= known:
        raise BatchError(
            f"cls runs from {int(classes.min())} to {int(classes.max())}, the model knows 0 to {known - 1}"
        )
    if int(index.min()) < 0 or int(index.max()) >= count:
        raise BatchError(f"batch_idx runs from {int(index.min())} to {int(index.max())}, the batch has {count} images")
    if not bool(torch.isfinite(boxes).all()):
        raise BatchError("bboxes hold NaN or infinity")
    if float(boxes.min()) < 0 or float(boxes.max()) > 1:
        raise BatchError("bboxes leave [0, 1]; ultralytics boxes are xywh divided by the image's width and height")
    if bool((boxes[:, 2:] <= 0).any()):
        raise BatchError("a box has no positive width and height; ultralytics boxes are xywh in [0, 1]")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the parts (P,) of the model's own loss in eval mode, as means over the images (ultralytics sums)."""
    parts = cast(Tensor, cast(Any, model.eval()).loss(batch.targets)[0])
    return parts.reshape(-1) / batch.count


def predict(model: nn.Module, batch: Batch) -> Any:
    """Run the network in eval mode and return its output."""
    return model.eval()(batch.images)


def label(model: nn.Module, batch: Batch) -> Batch:
    """Use the detector's own confident outputs after non-maximum suppression as targets."""
    height, width = batch.images.shape[-2:]
    with torch.no_grad():
        boxes, rows = decode_output(model, predict(model, batch), height, width)
        best = float(best_scores(model, boxes, rows).max())
        threshold = confidence_threshold(CONFIDENCE_THRESHOLD, best)
        found = suppress_overlaps(model, boxes, rows, confidence=threshold, iou=0.45, limit=100, multi_label=False)
    targets = _targets(batch.images, [(row[:, :4], row[:, 5]) for row in found])
    return Batch(batch.images, targets, batch.count, confidence=best)


def _targets(images: Tensor, found: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Make the targets of a batch from the boxes (x1, y1, x2, y2 in its pixels) and class numbers of every image."""
    height, width = images.shape[-2:]
    corners = torch.cat([clip(boxes, height, width) for boxes, _ in found])
    centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    index = torch.cat([classes.new_full((len(classes),), image) for image, (_, classes) in enumerate(found)])
    return {
        "img": images,
        "cls": torch.cat([classes for _, classes in found]).float()[:, None],
        "bboxes": (torch.cat([centres, sides], 1) / corners.new_tensor([width, height] * 2)).clamp(0, 1),
        "batch_idx": index.float(),
    }


def square_side(model: nn.Module, image_size: int | None) -> int:
    """Return the side of the model's square input, in pixels, rounded up to a multiple of its stride.

    The side is `image_size`, or the training size of the model, or 640 if the model does not store it.

    Raises
    ------
    SettingError
        If `image_size` is not a positive integer.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise SettingError(f"image_size is {image_size!r}; give the side of the square in pixels, or None")
    given = getattr(model, "args", None) or {}
    settings = given if isinstance(given, Mapping) else vars(given)
    trained = settings.get("imgsz") or IMAGE_SIZE
    side = image_size or (max(trained) if isinstance(trained, (list, tuple)) else int(trained))
    stride = int(max(torch.as_tensor(getattr(model, "stride", 32)).reshape(-1).tolist()))
    return math.ceil(side / stride) * stride


def input_channels(model: nn.Module) -> int:
    """Return the number of channels of the model's images: those that its first convolution reads."""
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)


def _letterbox_images(
    model: nn.Module, images: Sequence[Tensor], image_size: int | None
) -> tuple[Tensor, list[Placement]]:
    """Fit images of any sizes into squares (N, C, S, S) on the CPU; also return their placements."""
    side, stretch, channels = square_side(model, image_size), has_queries(model), input_channels(model)
    pairs = [letterbox(match_channels(check_image(image, 3, FORMS), channels), side, stretch) for image in images]
    return torch.stack([square for square, _ in pairs]), [placement for _, placement in pairs]


def detect(model: nn.Module, images: Sequence[Tensor], image_size: int | None) -> list[dict[str, Tensor]]:
    """Find boxes as ultralytics' ``val(rect=False)``: letterboxed, scores from 0.001, at most 300 boxes per image."""
    squares, placements = _letterbox_images(model, images, image_size)
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    with torch.no_grad():
        output = model(squares.to(device_of(model), dtype))
        rows = _suppress_as_val(model, *decode_output(model, output, *squares.shape[-2:]))
    return [{**row, "boxes": placement.to_image(row["boxes"])} for row, placement in zip(rows, placements, strict=True)]


def detections(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]] | None:
    """Find boxes in a batch, without letterboxing; with the key ``others`` if the model outputs masks or the like."""
    with torch.no_grad():
        boxes, rows = decode_output(model, predict(model, batch), *batch.images.shape[-2:])
        more = boxes.shape[-1] > BOX_COLUMNS if rows else boxes.shape[1] > 4 + count_classes(model)
        others = {"others": boxes[:0]} if more else {}
        return [{**found, **others} for found in _suppress_as_val(model, boxes, rows)]


def true_boxes(batch: Batch) -> list[dict[str, Tensor]]:
    """Return the boxes and class numbers of a batch's targets, in pixels of its images."""
    height, width = batch.images.shape[-2:]
    index, classes = (batch.targets[key].reshape(-1).long() for key in ("batch_idx", "cls"))
    boxes = batch.targets["bboxes"].reshape(-1, 4)
    centres, sides = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat([centres - sides, centres + sides], 1) * boxes.new_tensor([width, height] * 2)
    own = [index == image for image in range(batch.count)]
    return [{"boxes": corners[rows], "labels": classes[rows]} for rows in own]


def _suppress_as_val(model: nn.Module, boxes: Tensor, rows: bool) -> list[dict[str, Tensor]]:
    kept = suppress_overlaps(model, boxes.float(), rows, confidence=0.001, iou=0.7, limit=300, multi_label=True)
    return [{"boxes": row[:, :4], "labels": row[:, 5].long(), "scores": row[:, 4]} for row in kept]


def collate(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None, image_size: int | None
) -> dict[str, Tensor]:
    """Letterbox images and their boxes into a batch of ultralytics' form; see `FORMS`."""
    squares, placements = _letterbox_images(model, images, image_size)
    if targets is None:
        return {"img": squares}
    pairs = list(zip(targets, placements, strict=True))
    return _targets(squares, [(_move_to_square(target, placement), target["labels"]) for target, placement in pairs])


def _move_to_square(target: Mapping[str, Any], placement: Placement) -> Tensor:
    """Clip the boxes of a target to its image and convert them to pixels of the square."""
    boxes = clip(target["boxes"], placement.height, placement.width)
    outside = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
    if bool(outside.any()):
        raise BatchError(
            f"box {target['boxes'][outside][0].tolist()} of image {target.get('image_id', '(no id)')} lies outside"
            f" its {placement.width} x {placement.height} pixels or has no size; boxes are x1, y1, x2, y2 in pixels"
        )
    return placement.to_square(boxes)


ADAPTER = Adapter(
    family="ultralytics model",
    forms=FORMS,
    matches=lambda model, raw: "ultralytics.nn.tasks.BaseModel" in class_names(model),
    prepare=prepare,
    normalize=normalize,
    loss=loss,
    predict=predict,
    label=label,
    detections=detections,
    detect=detect,
    collate=collate,
    whole_model_is_graph=False,
    true_boxes=true_boxes,
    takes_unit_images=lambda model: True,
)
