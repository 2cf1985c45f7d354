"""Defines `Batch`, the common form of all batches, and `Adapter`, the functions for one family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fxprune.errors import BatchError, ModelError


@dataclass(frozen=True)
class Batch:
    """A batch in the common form that adapters work on.

    Attributes
    ----------
    images
        Input of the model: a tensor (N, 3, H, W), or a list of tensors (3, H, W) for torchvision detectors.
    targets
        Labels in the form that the adapter's loss needs; None without labels.
    count : int
        Number of images.
    own_targets : bool
        Whether the targets are the model's own confident outputs.
    confidence : float or None
        How sure the model is of its own targets: the score of the surest box, or for classes the mean over the images,
        0 at chance (all classes alike) and 1 at certainty. None for given targets.
    """

    images: Any
    targets: Any
    count: int
    own_targets: bool = False
    confidence: float | None = None


@dataclass(frozen=True)
class Adapter:
    """Functions by which fxprune runs one family of models. They work on a private copy of the model.

    Attributes
    ----------
    family : str
        Name of the family in messages and reports.
    forms : str
        The known batch forms, in words.
    matches : callable
        ``(model, raw batch) -> bool``.
    prepare : callable
        ``(model) -> None``: sets on the copy, once, what its loss needs.
    normalize : callable
        ``(model, raw batch) -> Batch`` on the model's device; raises `BatchError`.
    loss : callable
        ``(model, Batch) -> Tensor (P,)``: the parts whose sum is the loss, each a mean over the images of the batch.
        Sets the train or eval modes that it needs.
    predict : callable
        ``(model, Batch) -> output`` at inference. Sets eval mode.
    label : callable
        ``(model, Batch) -> Batch`` with the model's own confident outputs as targets.
    select_targets : callable
        ``(model, Batch, image numbers) -> targets`` of these images, in the form of the batch's targets.
    detections : callable
        ``(model, Batch) -> list of dict, or None``: the boxes at inference in the form of `detect`, in pixels of the
        batch's images. A model that outputs more than boxes (masks, key points) has other keys too. None if the model
        outputs no boxes.
    detect : callable
        ``(model, images, image size or None) -> list of dict``, for images (3, H, W) in [0, 1] of any sizes. One dict
        per image: ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels of the input image, ``labels`` (n,) the model's class
        numbers, ``scores`` (n,). The model is in eval mode already. Raises `ModelError` if it is no detector.
    collate : callable
        ``(model, images, targets or None, image size or None) -> raw batch`` for `normalize`, from images (3, H, W)
        in [0, 1] and targets, dicts with ``boxes`` and ``labels`` as in `detect`.
    whole_model_is_graph : bool
        Whether only the forward of the model is used, so that the whole model can be captured as one graph.
    classes : callable
        ``(model, Batch) -> Tensor (N,), or None``: the class with the highest logit of each image. None if the model
        outputs no logits.
    true_boxes : callable
        ``(Batch) -> list of dict, or None``: the boxes of the batch's targets, one dict of ``boxes`` and ``labels`` per
        image, as in `detections`. None if targets are no boxes.
    true_classes : callable
        ``(Batch) -> Tensor (N,), or None``: the class number of each image, of the batch's targets. The most
        probable one where targets are probabilities. None if targets are no classes.
    takes_unit_images : callable
        ``(model) -> bool``: whether the model needs float images in [0, 1], for example because it normalizes them.
    """

    family: str
    forms: str
    matches: Callable[[nn.Module, Any], bool]
    prepare: Callable[[nn.Module], None]
    normalize: Callable[[nn.Module, Any], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    predict: Callable[[nn.Module, Batch], Any]
    label: Callable[[nn.Module, Batch], Batch]
    select_targets: Callable[[nn.Module, Batch, Sequence[int]], Any]
    detections: Callable[[nn.Module, Batch], list[dict[str, Tensor]] | None]
    detect: Callable[[nn.Module, Sequence[Tensor], int | None], list[dict[str, Tensor]]]
    collate: Callable[[nn.Module, Sequence[Tensor], Sequence[Mapping[str, Any]] | None, int | None], Any]
    whole_model_is_graph: bool
    classes: Callable[[nn.Module, Batch], Tensor | None] = lambda model, batch: None
    true_boxes: Callable[[Batch], list[dict[str, Tensor]] | None] = lambda batch: None
    true_classes: Callable[[Batch], Tensor | None] = lambda batch: None
    takes_unit_images: Callable[[nn.Module], bool] = lambda model: False


def select_items(values: Any, numbers: Sequence[int]) -> Any:
    """Return the rows of a tensor, or the items of a list, with these numbers. A range gives a view of a tensor.

    Examples
    --------
    >>> select_items([4, 5, 6], [0, 2])
    [4, 6]
    """
    if isinstance(numbers, range):
        return values[numbers.start : numbers.stop : numbers.step]
    return values[list(numbers)] if isinstance(values, Tensor) else [values[number] for number in numbers]


def refuse_detection(model: nn.Module, *_: Any) -> NoReturn:
    """Refuse `detect` and `collate`, for models that output no boxes.

    Raises
    ------
    ModelError
        Always.
    """
    raise ModelError(
        f"{type(model).__name__} is not known to give boxes; evaluate and batches take ultralytics models and detectors"
        " of torchvision's convention (input: a list of images; output in eval mode: a list of dicts with boxes,"
        " labels, scores). Evaluate this model with your own loop, and make its calibration batches yourself"
    )


def confidence_threshold(usual: float, best: float) -> float:
    """Return the least score of outputs that serve as labels: `usual`, or half the best score if that is less."""
    return min(usual, best / 2)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def check_image(image: Any, rank: int, forms: str, scale: bool = True) -> Tensor:
    """Return an image tensor after a check of its type, rank and values.

    It is in float32. Integer images are read as 0..255 and scaled to [0, 1], or stay as they are if `scale` is False.

    Raises
    ------
    BatchError
        If it is no tensor, has another rank, or contains NaN or infinity.
    """
    if not isinstance(image, Tensor):
        raise BatchError(f"expected an image tensor, got {type(image).__name__}; known forms: {forms}")
    if image.ndim != rank:
        raise BatchError(f"expected {rank} dimensions, got an image tensor of shape {tuple(image.shape)}; {forms}")
    if not image.is_floating_point():
        return image.float() / 255 if scale else image
    scaled = image.float()
    if not bool(torch.isfinite(scaled).all()):
        raise BatchError("an image holds NaN or infinity; remove such values from the calibration images")
    return scaled


def stack_images(images: Any, forms: str, scale: bool = True) -> Tensor:
    """Return a tensor (N, C, H, W) from such a tensor or from a list of equally sized (C, H, W) tensors.

    Every image is read by `check_image`.

    Raises
    ------
    BatchError
        If the sizes differ (the message lists them), or if the batch is empty.
    """
    if isinstance(images, (list, tuple)):
        rows = [check_image(image, 3, forms, scale) for image in images]
        sizes = sorted({tuple(row.shape) for row in rows})
        if len(sizes) > 1:
            raise BatchError(f"this model needs images of one size in a batch, got {sizes}; resize or pad them")
        if not rows:
            raise BatchError("the batch holds no image")
        return torch.stack(rows)
    stacked = check_image(images, 4, forms, scale)
    if not len(stacked):
        raise BatchError("the batch holds no image")
    return stacked
