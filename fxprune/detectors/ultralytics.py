"""Ultralytics models: `DetectionModel` and its kin, and the `YOLO` object around one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.detectors.batch import Adapter, Batch, device_of, stack_images
from fxprune.errors import BatchError, ModelError
from fxprune.graph import class_names

FORMS = (
    "dict(img=Tensor(N, 3, H, W), cls=Tensor(n, 1), bboxes=Tensor(n, 4) xywh in [0, 1], batch_idx=Tensor(n)),"
    " or images alone as dict(img=...) or Tensor(N, 3, H, W)"
)
CONFIDENT = 0.25
"""Score from which an output serves as a label (ultralytics' own prediction threshold)."""


def is_wrapper(model: nn.Module) -> bool:
    """Whether the model is a `YOLO`-like object around a network."""
    return "ultralytics.engine.model.Model" in class_names(model)


def unwrap(model: nn.Module) -> nn.Module:
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


def rewrap(model: nn.Module, network: nn.Module) -> nn.Module:
    """Return a copy of a `YOLO` object around another network; what the old one cached is left behind."""
    twin = copy.copy(model)
    twin.__dict__ = {key: copy.copy(value) for key, value in model.__dict__.items()}
    twin.__dict__.update(predictor=None, trainer=None, metrics=None)
    twin._modules["model"] = network
    return twin


def prepare(model: nn.Module) -> None:
    """Give the copy what its loss reads and ultralytics' trainer would set: the gains, the number of classes."""
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
    """Read a batch of ultralytics' form; see `FORMS`."""
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
    """The model's own loss in eval mode, its parts summed; ultralytics sums over the images, this is the mean."""
    parts = cast(Any, model.eval()).loss(batch.targets)[0]
    return cast(Tensor, parts.sum()) / batch.count


def predict(model: nn.Module, batch: Batch) -> Any:
    """Return what the network gives at inference."""
    return model.eval()(batch.images)


def label(model: nn.Module, batch: Batch) -> Batch:
    """Use the detector's own confident outputs, after non-maximum suppression, as targets."""
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.ops import xyxy2xywhn

    with torch.no_grad():
        raw = predict(model, batch)
    raw = raw[0] if isinstance(raw, (list, tuple)) else raw
    scores = raw[..., 4] if raw.shape[-1] == 6 else raw[:, 4:].amax(1)
    threshold = min(CONFIDENT, float(scores.max()) / 2)
    height, width = batch.images.shape[-2:]
    scale = raw.new_tensor([width, height, width, height])
    if raw.shape[-1] != 6 and float(raw[:, :4].max()) <= 2:  # DETR-like heads give boxes in [0, 1]
        raw = torch.cat([raw[:, :4] * scale[:, None], raw[:, 4:]], 1)
    found = non_max_suppression(raw, conf_thres=threshold, max_det=100, end2end=raw.shape[-1] == 6)
    rows = torch.cat([torch.cat([row.new_full((len(row), 1), i), row[:, :6]], 1) for i, row in enumerate(found)])
    targets = {
        "img": batch.images,
        "cls": rows[:, 6:7],
        "bboxes": xyxy2xywhn(rows[:, 1:5], w=width, h=height, clip=True).clamp(0, 1),
        "batch_idx": rows[:, 0],
    }
    return Batch(batch.images, targets, batch.count)


ADAPTER = Adapter(
    family="ultralytics model",
    forms=FORMS,
    fits=lambda model, raw: "ultralytics.nn.tasks.BaseModel" in class_names(model),
    prepare=prepare,
    normalize=normalize,
    loss=loss,
    predict=predict,
    label=label,
    root_is_function=False,
)
