"""One form for every batch, whatever the loader gave, and the record of functions an adapter is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fxprune.errors import BatchError, ModelError


@dataclass(frozen=True)
class Batch:
    """A batch in the form its adapter works on.

    Attributes
    ----------
    images
        What the model takes: a tensor (N, 3, H, W), or a list of tensors (3, H, W) for torchvision detectors.
    targets
        Labels in the form the adapter's loss takes, or None where there are none.
    count : int
        Number of images.
    """

    images: Any
    targets: Any
    count: int


@dataclass(frozen=True)
class Adapter:
    """How fxprune talks to one family of models. Functions work on a private copy of the model.

    Attributes
    ----------
    family : str
        Name for messages and reports.
    forms : str
        The known batch forms, in words.
    matches : callable
        ``(model, raw batch) -> bool``.
    prepare : callable
        ``(model) -> None``: what must be set once on the copy before a loss can be had.
    normalize : callable
        ``(model, raw batch) -> Batch`` on the model's device; raises `BatchError`.
    loss : callable
        ``(model, Batch) -> Tensor (P,)``: the parts that the loss is the sum of, each the mean over the images of the
        batch; sets the modes it needs.
    predict : callable
        ``(model, Batch) -> outputs`` as at inference; sets eval mode.
    label : callable
        ``(model, Batch) -> Batch`` with the model's own confident outputs as targets.
    detections : callable
        ``(model, Batch) -> one dict an image, or None``: what it finds at inference as `detect` gives it, in pixels of
        the batch's images; None where that is not boxes, or more than boxes.
    detect : callable
        ``(model, images, image size or None) -> one dict an image``: for images (3, H, W) in [0, 1] of any sizes,
        ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels of the image given, ``labels`` (n,) the model's class numbers,
        ``scores`` (n,). The model is in eval mode already. Raises `ModelError` if it is no detector.
    collate : callable
        ``(model, images, targets or None, image size or None) -> raw batch`` that `normalize` takes, from images
        (3, H, W) in [0, 1] and dicts of ``boxes`` and ``labels`` as `detect` gives them.
    whole_model_is_graph : bool
        Whether the model is just its forward, so that a GraphModule can stand in for the whole of it.
    """

    family: str
    forms: str
    matches: Callable[[nn.Module, Any], bool]
    prepare: Callable[[nn.Module], None]
    normalize: Callable[[nn.Module, Any], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    predict: Callable[[nn.Module, Batch], Any]
    label: Callable[[nn.Module, Batch], Batch]
    detections: Callable[[nn.Module, Batch], list[dict[str, Tensor]] | None]
    detect: Callable[[nn.Module, Sequence[Tensor], int | None], list[dict[str, Tensor]]]
    collate: Callable[[nn.Module, Sequence[Tensor], Sequence[Mapping[str, Any]] | None, int | None], Any]
    whole_model_is_graph: bool


def refuse_detection(model: nn.Module, *_: Any) -> NoReturn:
    """Stand in for `detect` and `collate` where a model gives no boxes.

    Raises
    ------
    ModelError
        Always.
    """
    raise ModelError(
        f"{type(model).__name__} is not known to give boxes; evaluate and batches take detectors of torchvision's"
        " convention (a list of images in; in eval mode a list of dicts with boxes, labels, scores out) and ultralytics"
        " models: measure this one with a loop of your own, and make its calibration batches by hand"
    )


def confidence_threshold(usual: float, best: float) -> float:
    """Score from which what a model finds serves as a label: the usual one, or half the best score if that is less."""
    return min(usual, best / 2)


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's first parameter or buffer; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def check_image(image: Any, rank: int, forms: str) -> Tensor:
    """Return an image tensor as float32, refused unless it is a numeric tensor of the given rank.

    Integer images are read as 0..255 and scaled to [0, 1].

    Raises
    ------
    BatchError
        If it is no tensor, has another rank, or holds NaN or infinity.
    """
    if not isinstance(image, Tensor):
        raise BatchError(f"expected an image tensor, got {type(image).__name__}; known forms: {forms}")
    if image.ndim != rank:
        raise BatchError(f"expected {rank} dimensions, got an image tensor of shape {tuple(image.shape)}; {forms}")
    scaled: Tensor = image.float() if image.is_floating_point() else image.float() / 255
    if not bool(torch.isfinite(scaled).all()):
        raise BatchError("an image holds NaN or infinity; clean the calibration images")
    return scaled


def stack_images(images: Any, forms: str) -> Tensor:
    """Return a tensor (N, C, H, W) from such a tensor or from a list of equally sized (C, H, W) tensors.

    Raises
    ------
    BatchError
        If sizes differ (named) or the batch is empty.
    """
    if isinstance(images, (list, tuple)):
        rows = [check_image(image, 3, forms) for image in images]
        sizes = sorted({tuple(row.shape) for row in rows})
        if len(sizes) > 1:
            raise BatchError(f"this model needs images of one size in a batch, got {sizes}; resize or pad them")
        if not rows:
            raise BatchError("the batch holds no image")
        return torch.stack(rows)
    stacked = check_image(images, 4, forms)
    if not len(stacked):
        raise BatchError("the batch holds no image")
    return stacked
