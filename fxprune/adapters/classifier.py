"""Adapter of image classifiers: input images (N, 3, H, W), output logits (N, classes).

Float images go to the model as they are. Integer images do so too if the model takes them, for example because it
divides them by 255 itself. Otherwise they are scaled to float in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.adapters.protocol import Adapter, Batch, device_of, refuse_detection, select_items, stack_images
from fxprune.errors import BatchError, ModelError

FORMS = (
    "(Tensor(N, 3, H, W), Tensor(N) of class indices), images alone as Tensor(N, 3, H, W), or any other form with"
    " loss=callable(model, batch) -> scalar tensor"
)


def normalize(model: nn.Module, raw: Any) -> Batch:
    """Convert a raw batch in one of the `FORMS` to a `Batch` on the model's device."""
    if isinstance(raw, Mapping):
        raise BatchError(f"got a dict with keys {sorted(map(str, raw))}; known forms for a classifier: {FORMS}")
    pair = isinstance(raw, (list, tuple)) and len(raw) == 2 and isinstance(raw[1], Tensor) and raw[1].ndim != 3
    if not pair:
        alone = raw[0] if isinstance(raw, (list, tuple)) and len(raw) == 1 and _rank(raw[0]) == 4 else raw
        images = _read_images(model, alone)
        return Batch(images, None, len(images))
    images, labels = _read_images(model, raw[0]), raw[1].to(device_of(model))
    if len(labels) != len(images):
        raise BatchError(f"{len(images)} images but {len(labels)} labels")
    if labels.ndim == 1 and labels.is_floating_point():
        raise BatchError("labels are floating point; give class indices as integers, or probabilities (N, classes)")
    return Batch(images, labels.long() if labels.ndim == 1 else labels.float(), len(images))


def _read_images(model: nn.Module, images: Any) -> Tensor:
    """Return images (N, C, H, W) on the model's device. Integer images stay integers if the model takes them."""
    given = stack_images(images, FORMS, scale=False).to(device_of(model))
    if given.is_floating_point() or _takes(model, given[:1]):
        return given
    return stack_images(given, FORMS)


def _takes(model: nn.Module, images: Tensor) -> bool:
    """Whether the model runs on images in eval mode."""
    modes = {part: part.training for part in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(images)
    except (RuntimeError, TypeError, ValueError):  # for example a convolution that expects floats
        return False
    finally:
        for part, training in modes.items():
            part.training = training
    return True


def _rank(value: Any) -> int:
    return value.ndim if isinstance(value, Tensor) else -1


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model in eval mode and return logits (N, classes).

    Raises
    ------
    ModelError
        If the output is anything else, because its loss is then not known.
    """
    output = model.eval()(batch.images)
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"{type(model).__name__} returned {got}, not logits (N, classes): give a loss as"
            " loss=callable(model, batch) -> scalar tensor"
        )
    return output


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the cross entropy, a scalar, as mean over the images. Every module is in eval mode."""
    logits, labels = predict(model, batch), batch.targets
    if labels.ndim == 2 and labels.shape != logits.shape:
        raise BatchError(f"labels have {labels.shape[1]} classes, the model {logits.shape[1]}")
    if labels.ndim == 1 and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
        raise BatchError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, the model knows 0 to {logits.shape[1] - 1}"
        )
    return functional.cross_entropy(logits, labels)


def label(model: nn.Module, batch: Batch) -> Batch:
    """Use the class with the model's highest logit as the label of each image."""
    with torch.no_grad():
        logits = predict(model, batch)
        return Batch(batch.images, logits.argmax(1), batch.count, confidence=class_confidence(logits))


def class_confidence(logits: Tensor) -> float | None:
    """Return the mean probability of the top class, 0 at chance and 1 at certainty; None for a single class."""
    count = logits.shape[1]
    probability = float(logits.float().softmax(1).amax(1).mean())
    return (probability - 1 / count) / (1 - 1 / count) if count > 1 else None


def classes(model: nn.Module, batch: Batch) -> Tensor:
    """Return the class with the highest logit of each image."""
    with torch.no_grad():
        return predict(model, batch).argmax(1)


ADAPTER = Adapter(
    family="classifier",
    forms=FORMS,
    matches=lambda model, raw: True,
    prepare=lambda model: None,
    normalize=normalize,
    loss=loss,
    predict=predict,
    label=label,
    select_targets=lambda model, batch, numbers: select_items(batch.targets, numbers),
    detections=lambda model, batch: None,
    detect=refuse_detection,
    collate=refuse_detection,
    whole_model_is_graph=True,
    classes=classes,
    true_classes=lambda batch: batch.targets.argmax(1) if batch.targets.ndim == 2 else batch.targets,
)
