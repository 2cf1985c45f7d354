"""Adapter of ultralytics models: `DetectionModel` and similar classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch, check_image, device_of, stack_images
from fxprune.adapters.ultralytics.decoding import (
    BOX_COLUMNS,
    count_classes,
    decode_output,
    has_queries,
    suppress_overlaps,
)
from fxprune.adapters.ultralytics.letterbox import Placement, clip, letterbox, match_channels
from fxprune.adapters.ultralytics.pruned_yaml import is_ultralytics
from fxprune.adapters.ultralytics.tasks import TASKS, label, select_targets, targets_of_boxes, task_of
from fxprune.errors import BatchError, ModelError, SettingError

FORMS = (
    "dict(img=Tensor(N, C, H, W), cls=Tensor(n, 1), bboxes=Tensor(n, 4) xywh in [0, 1], batch_idx=Tensor(n)), with"
    " masks for segmentation, keypoints for poses, bboxes=Tensor(n, 5) xywhr for rotated boxes; dict(img=...,"
    " cls=Tensor(N)) or (Tensor(N, C, H, W), Tensor(N)) for classification; or images alone as dict(img=...) or"
    " Tensor(N, C, H, W)"
)
IMAGE_SIZE = 640
"""Side of the square, in pixels, if a model does not store its training size (ultralytics' default)."""


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
    device, task = device_of(model), task_of(model)
    if not isinstance(raw, Mapping):
        raw = _as_mapping(raw, pairs=task.keys == ("cls",))
    if "img" not in raw:
        raise BatchError(f"the batch has keys {sorted(map(str, raw))} and no 'img'; known forms: {FORMS}")
    images = stack_images(raw["img"], FORMS).to(device)
    missing = [key for key in task.keys if key not in raw]
    if len(missing) == len(task.keys):
        return Batch(images, None, len(images))
    if missing:
        raise BatchError(f"the batch lacks {missing}; known forms: {FORMS}")
    targets = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in raw.items()}
    for key in task.keys:
        if not isinstance(targets[key], Tensor):
            raise BatchError(f"{key} should be a tensor, got {type(targets[key]).__name__}; known forms: {FORMS}")
    if task.columns:
        _check_boxes(model, targets, len(images), task.columns)
    elif len(targets[task.keys[0]]) != len(images):
        raise BatchError(f"{len(images)} images but {len(targets[task.keys[0]])} {task.keys[0]}")
    elif task.keys == ("cls",):
        targets["cls"] = targets["cls"].reshape(-1).long()
        _check_classes(model, targets["cls"])
    return Batch(images, targets | {"img": images}, len(images))


def _as_mapping(raw: Any, pairs: bool) -> dict[str, Any]:
    """Name the parts of a batch that is no mapping: images alone, or images and classes."""
    if isinstance(raw, (list, tuple)) and len(raw) == 1:
        return {"img": raw[0]}
    if pairs and isinstance(raw, (list, tuple)) and len(raw) == 2 and isinstance(raw[1], Tensor) and raw[1].ndim < 3:
        return {"img": raw[0], "cls": raw[1]}
    return {"img": raw}


def _check_classes(model: nn.Module, classes: Tensor) -> None:
    known = len(getattr(model, "names", ())) or int(getattr(model, "nc", 0)) or int(classes.max()) + 1
    if len(classes) and (int(classes.min()) < 0 or int(classes.max()) >= known):
        raise BatchError(
            f"cls runs from {int(classes.min())} to {int(classes.max())}, the model knows 0 to {known - 1}"
        )


def _check_boxes(model: nn.Module, targets: Mapping[str, Any], count: int, columns: int) -> None:
    if targets["bboxes"].numel() and (targets["bboxes"].ndim != 2 or targets["bboxes"].shape[1] != columns):
        form = "xywh in [0, 1]" if columns == 4 else "xywh in [0, 1] and the angle"
        raise BatchError(f"bboxes have shape {tuple(targets['bboxes'].shape)}; they are (n, {columns}), {form}")
    classes, index = targets["cls"].reshape(-1), targets["batch_idx"].reshape(-1)
    boxes = targets["bboxes"][..., :4]
    if not len(classes) == len(boxes) == len(index):
        raise BatchError(f"{len(classes)} cls, {len(boxes)} bboxes and {len(index)} batch_idx should be equally many")
    if not len(classes):
        return
    _check_classes(model, classes)
    if int(index.min()) < 0 or int(index.max()) >= count:
        raise BatchError(f"batch_idx runs from {int(index.min())} to {int(index.max())}, the batch has {count} images")
    if not bool(torch.isfinite(boxes).all()):
        raise BatchError("bboxes hold NaN or infinity")
    if float(boxes.min()) < 0 or float(boxes.max()) > 1:
        raise BatchError("bboxes leave [0, 1]; ultralytics boxes are xywh divided by the image's width and height")
    if bool((boxes[:, 2:] <= 0).any()):
        raise BatchError("a box has no positive width and height; ultralytics boxes are xywh in [0, 1]")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the parts (P,) of the model's own loss in eval mode, as means over the images.

    A model that knows its classes from texts uses the features of the texts that it holds, unless the batch has others.
    """
    network, task = cast(Any, model.eval()), task_of(model)
    own = has_queries(model) or {"txt_feats", "visuals"} & set(batch.targets)  # then the loss calls the model itself
    output = network.loss(batch.targets, None if own else model(batch.images))
    parts = cast(Tensor, output[0]).reshape(-1)
    return parts / batch.count if task.sums else parts


def predict(model: nn.Module, batch: Batch) -> Any:
    """Run the network in eval mode and return its output."""
    return model.eval()(batch.images)


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
    if task_of(model).columns == 5:
        name = type(model).__name__
        raise ModelError(f"{name} finds rotated boxes, which fxprune cannot evaluate; give a detector of upright boxes")
    squares, placements = _letterbox_images(model, images, image_size)
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    with torch.no_grad():
        output = model(squares.to(device_of(model), dtype))
        rows = _suppress_as_val(model, *decode_output(model, output, *squares.shape[-2:]))
    return [{**row, "boxes": placement.to_image(row["boxes"])} for row, placement in zip(rows, placements, strict=True)]


def detections(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]] | None:
    """Find boxes in a batch, without letterboxing; with the key ``others`` if the model outputs masks or the like."""
    if task_of(model).columns != 4:
        return None
    with torch.no_grad():
        boxes, rows = decode_output(model, predict(model, batch), *batch.images.shape[-2:])
        more = boxes.shape[-1] > BOX_COLUMNS if rows else boxes.shape[1] > 4 + count_classes(model)
        others = {"others": boxes[:0]} if more else {}
        return [{**found, **others} for found in _suppress_as_val(model, boxes, rows)]


def classes(model: nn.Module, batch: Batch) -> Tensor | None:
    """Return the most likely class of each image; None if the model is no classifier."""
    if task_of(model).keys != ("cls",):
        return None
    with torch.no_grad():
        return cast(Tensor, task_of(model).label(model, predict(model, batch), batch.images)[0]["cls"])


def true_classes(batch: Batch) -> Tensor | None:
    """Return the class number of each image, of a classifier."""
    return None if "bboxes" in batch.targets else cast("Tensor | None", batch.targets.get("cls"))


def true_boxes(batch: Batch) -> list[dict[str, Tensor]] | None:
    """Return the boxes and class numbers of a batch's targets, in pixels of its images, without angles."""
    if "bboxes" not in batch.targets:
        return None
    height, width = batch.images.shape[-2:]
    index, classes = (batch.targets[key].reshape(-1).long() for key in ("batch_idx", "cls"))
    boxes = batch.targets["bboxes"]
    centres, sides = boxes[:, :2], boxes[:, 2:4] / 2
    corners = torch.cat([centres - sides, centres + sides], 1) * boxes.new_tensor([width, height] * 2)
    own = [index == image for image in range(batch.count)]
    return [{"boxes": corners[rows], "labels": classes[rows]} for rows in own]


def _suppress_as_val(model: nn.Module, boxes: Tensor, rows: bool) -> list[dict[str, Tensor]]:
    kept = suppress_overlaps(model, boxes.float(), rows, confidence=0.001, iou=0.7, limit=300, multi_label=True)
    return [{"boxes": row[:, :4], "labels": row[:, 5].long(), "scores": row[:, 4]} for row in kept]


def collate(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None, image_size: int | None
) -> dict[str, Tensor]:
    """Letterbox images and their boxes into a batch of ultralytics' form; see `FORMS`.

    Images alone for a task whose loss needs more than upright boxes, such as masks.
    """
    squares, placements = _letterbox_images(model, images, image_size)
    if targets is None or task_of(model) is not TASKS["detect"]:
        return {"img": squares}
    pairs = list(zip(targets, placements, strict=True))
    return targets_of_boxes(squares, [_move_to_square(target, placement) for target, placement in pairs])


def _move_to_square(target: Mapping[str, Any], placement: Placement) -> Tensor:
    """Return rows of boxes in pixels of the square, clipped to their image, a 1, and the class."""
    boxes = clip(target["boxes"], placement.height, placement.width)
    outside = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
    if bool(outside.any()):
        raise BatchError(
            f"box {target['boxes'][outside][0].tolist()} of image {target.get('image_id', '(no id)')} lies outside"
            f" its {placement.width} x {placement.height} pixels or has no size; boxes are x1, y1, x2, y2 in pixels"
        )
    labels = target["labels"].to(boxes)[:, None]
    return torch.cat([placement.to_square(boxes), torch.ones_like(labels), labels], 1)


ADAPTER = Adapter(
    family="ultralytics model",
    forms=FORMS,
    matches=lambda model, raw: is_ultralytics(model),
    prepare=prepare,
    normalize=normalize,
    loss=loss,
    predict=predict,
    label=label,
    select_targets=select_targets,
    detections=detections,
    detect=detect,
    collate=collate,
    whole_model_is_graph=False,
    classes=classes,
    true_boxes=true_boxes,
    true_classes=true_classes,
    takes_unit_images=lambda model: True,
)
