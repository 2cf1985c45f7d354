"""Adapter of detectors with torchvision's convention: losses in train mode, boxes in eval mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch, check_image, confidence_threshold, device_of, select_items
from fxprune.errors import BatchError, LossError, ModelError
from fxprune.graph.fx_utils import class_names

FORMS = (
    "(list of Tensor(3, H, W), list of dict(boxes=Tensor(n, 4) xyxy, labels=Tensor(n))),"
    " or images alone as list of Tensor(3, H, W) or Tensor(N, 3, H, W)"
)
CONFIDENCE_THRESHOLD = 0.5
"""Least score of outputs that serve as labels; half the best score of an image if that is less."""
CONVENTION = (
    "a detector of torchvision's convention takes a list of Tensor(3, H, W) and returns, in eval mode, one dict of"
    " boxes, labels and scores per image: wrap the model in such a module, or evaluate it with your own loop"
)


def matches(model: nn.Module, raw: Any) -> bool:
    """Whether the model is one of torchvision's detectors, or the batch has the form of theirs."""
    return is_torchvision_detector(model) or _is_pair(raw)


def is_torchvision_detector(model: nn.Module) -> bool:
    """Whether the model is one of torchvision's own detectors."""
    return any(name.startswith("torchvision.models.detection.") for name in class_names(model))


def _is_pair(raw: Any) -> bool:
    return (
        isinstance(raw, (list, tuple))
        and len(raw) == 2
        and isinstance(raw[1], (list, tuple))
        and all(isinstance(target, Mapping) for target in raw[1])
    )


def normalize(model: nn.Module, raw: Any) -> Batch:
    """Convert a raw batch in one of the `FORMS` to a `Batch` on the model's device."""
    device = device_of(model)
    if isinstance(raw, Mapping) or not isinstance(raw, (Tensor, list, tuple)):
        raise BatchError(f"got a {type(raw).__name__}; known forms for a torchvision detector: {FORMS}")
    images = raw[0] if _is_pair(raw) else raw
    if isinstance(images, (list, tuple)) and len(images) == 1 and isinstance(images[0], Tensor) and images[0].ndim == 4:
        images = images[0]
    rows = [check_image(image, 3, FORMS).to(device) for image in images]
    if not rows:
        raise BatchError("the batch holds no image")
    if not _is_pair(raw):
        return Batch(rows, None, len(rows))
    if len(raw[1]) != len(rows):
        raise BatchError(f"{len(rows)} images but {len(raw[1])} targets")
    return Batch(rows, [_read_target(target, device) for target in raw[1]], len(rows))


def _read_target(target: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    missing = {"boxes", "labels"} - set(target)
    if missing:
        raise BatchError(f"a target lacks {sorted(missing)}, it has {sorted(map(str, target))}; known forms: {FORMS}")
    read = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}
    try:
        boxes = torch.as_tensor(read["boxes"], dtype=torch.float32, device=device)
        labels = torch.as_tensor(read["labels"], dtype=torch.int64, device=device).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(f"boxes or labels cannot be read as numbers ({error}); known forms: {FORMS}") from error
    if boxes.numel() and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise BatchError(f"boxes have shape {tuple(boxes.shape)}; boxes are (n, 4), [x1, y1, x2, y2] in pixels")
    boxes = boxes.reshape(-1, 4)
    if not bool(torch.isfinite(boxes).all()):
        raise BatchError("a box holds NaN or infinity")
    if len(boxes) != len(labels):
        raise BatchError(f"a target has {len(boxes)} boxes but {len(labels)} labels")
    if len(labels) and int(labels.min()) < 0:
        raise BatchError(f"label {int(labels.min())} is negative; labels count from 0 (background) upwards")
    if len(boxes) and not bool((boxes[:, 2:] > boxes[:, :2]).all()):
        raise BatchError("a box has no positive width and height; boxes are [x1, y1, x2, y2] in pixels")
    return {**read, "boxes": boxes, "labels": labels}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the detector's losses (P,), in the order of its output; each is a mean over the images.

    Torchvision returns losses only in train mode. Only containers are set to train mode. Layers stay in eval mode:
    norms keep their statistics and dropout is off, as at inference.
    """
    losses = _trainable_mode(model)(batch.images, [dict(target) for target in batch.targets])
    if not isinstance(losses, Mapping) or not losses:
        raise LossError(f"{type(model).__name__} returned {type(losses).__name__} in train mode, not a dict of losses")
    return torch.stack([value.sum() for value in losses.values()])


def _trainable_mode(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) or not any(True for _ in module.children()):
            module.eval()
    return model


def predict(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """Run the detector in eval mode and return one dict of boxes, labels and scores per image."""
    outputs: list[dict[str, Tensor]] = model.eval()(batch.images)
    return outputs


def label(model: nn.Module, batch: Batch) -> Batch:
    """Use the detector's own confident outputs as targets."""
    with torch.no_grad():
        outputs = predict(model, batch)
    best = max((float(output["scores"].max()) for output in outputs if len(output["scores"])), default=0.0)
    return Batch(batch.images, [_confident_targets(output) for output in outputs], batch.count, confidence=best)


def detections(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]] | None:
    """Return the boxes found at inference, with masks or key points if the detector outputs these too."""
    with torch.no_grad():
        outputs = predict(model, batch)
    return outputs if all(map(_is_detection, outputs)) else None


def true_boxes(batch: Batch) -> list[dict[str, Tensor]]:
    """Return the boxes and labels of a batch's targets."""
    return [{"boxes": target["boxes"], "labels": target["labels"]} for target in batch.targets]


def takes_unit_images(model: nn.Module) -> bool:
    """Whether the model normalizes images by itself, as torchvision's detectors do, which have a `transform` for it."""
    transform = getattr(model, "transform", None)
    mean, std = (list(getattr(transform, name, None) or ()) for name in ("image_mean", "image_std"))
    return any(mean) or any(value != 1 for value in std)


def _confident_targets(output: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scores = output["scores"]
    threshold = confidence_threshold(CONFIDENCE_THRESHOLD, float(scores.max()) if len(scores) else 1.0)
    sides = output["boxes"][:, 2:] - output["boxes"][:, :2]
    keep = (scores >= threshold) & (sides > 0).all(1)
    target = {key: value[keep] for key, value in output.items() if len(value) == len(keep) and key != "scores"}
    if "masks" in target:
        target["masks"] = (target["masks"][:, 0] > CONFIDENCE_THRESHOLD).to(torch.uint8)
    return target


def detect(model: nn.Module, images: Sequence[Tensor], image_size: int | None) -> list[dict[str, Tensor]]:
    """Run the detector on images of any sizes. It resizes them itself and ignores `image_size`."""
    device = device_of(model)
    rows = [check_image(image, 3, FORMS).to(device) for image in images]
    if is_torchvision_detector(model):
        outputs = model(rows)
    else:
        try:
            outputs = model(rows)
        except (TypeError, AttributeError) as error:  # a model that takes a tensor was called with a list
            said = str(error).split("\n")[0]
            raise ModelError(
                f"{type(model).__name__} cannot take a list of images ({type(error).__name__}: {said}); {CONVENTION}"
            ) from error
    if not isinstance(outputs, (list, tuple)) or len(outputs) != len(rows) or not all(map(_is_detection, outputs)):
        got = f"{type(outputs).__name__} of {len(outputs)}" if isinstance(outputs, Sized) else type(outputs).__name__
        raise ModelError(f"{type(model).__name__} gave a {got} for {len(rows)} images; {CONVENTION}")
    return [{key: output[key].detach() for key in ("boxes", "labels", "scores")} for output in outputs]


def _is_detection(output: Any) -> bool:
    return isinstance(output, Mapping) and {"boxes", "labels", "scores"} <= set(output)


def collate(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]] | None, image_size: int | None
) -> Any:
    """Return (list of images, list of targets), or the list of images without targets."""
    rows = [check_image(image, 3, FORMS) for image in images]
    return rows if targets is None else (rows, [dict(target) for target in targets])


ADAPTER = Adapter(
    family="torchvision detector",
    forms=FORMS,
    matches=matches,
    prepare=lambda model: None,
    normalize=normalize,
    loss=loss,
    predict=predict,
    label=label,
    select_targets=lambda model, batch, numbers: select_items(batch.targets, numbers),
    detections=detections,
    detect=detect,
    collate=collate,
    whole_model_is_graph=False,
    true_boxes=true_boxes,
    takes_unit_images=takes_unit_images,
)
