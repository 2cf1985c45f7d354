"""COCO evaluation of a detector: average precision over a data set, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from fxprune.errors import BatchError

# Where each figure stands in COCOeval.stats.
STATS = {"mAP": 0, "mAP50": 1, "mAP75": 2, "mAP_small": 3, "mAP_medium": 4, "mAP_large": 5, "mAR": 8}


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one image, detected or true.

    Attributes
    ----------
    xywh : ndarray
        Left, top, width, height in pixels, float64 of shape (n, 4).
    labels : ndarray
        Category ids, int64 of shape (n,).
    scores : ndarray
        Confidence in [0, 1], float64 of shape (n,); ones where the boxes are the truth.
    """

    xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Average precision of a torchvision detector on a data set.

    Parameters
    ----------
    model : nn.Module
        Takes a list of image Tensors and, in eval mode, returns a list of dicts of ``boxes``, ``labels``, ``scores``.
    dataset : map-style dataset
        Items are ``(image, target)``: a float Tensor of shape (3, H, W), and a dict of ``boxes`` (n, 4) as x1, y1, x2,
        y2 in pixels and ``labels`` (n,); n may be 0. The label numbers must mean the same as the model's.
    batch_size : int
        Images per forward pass.
    progress : callable, optional
        Called with the number of images done, after every batch.

    Returns
    -------
    dict of str to float
        ``mAP`` (mean over IoU .50 to .95), ``mAP50``, ``mAP75``, ``mAP_small``, ``mAP_medium``, ``mAP_large`` (COCO's
        box areas) and ``mAR`` (100 detections per image), in [0, 1]; NaN for a size the data set has no box of.

    Raises
    ------
    BatchError
        `batch_size` is less than 1, an item is malformed, or the data set has no box at all: precision is undefined.
    """
    if batch_size < 1:
        raise BatchError(f"batch_size is {batch_size}; give 1 or more.")
    truth: list[Boxes] = []
    found: list[Boxes] = []
    with _eval_mode(model), torch.inference_mode():
        for start in range(0, len(dataset), batch_size):
            items = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            truth += [_read_target(item, start + offset) for offset, item in enumerate(items)]
            found += detect(model, [image for image, _ in items])
            if progress is not None:
                progress(len(found))
    return average_precision(truth, found)


def detect(model: nn.Module, images: Sequence[Tensor]) -> list[Boxes]:
    """Run a detector, already in eval mode, on one batch of images of shape (3, H, W); one `Boxes` per image."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return read_outputs(model([image.to(device) for image in images]))


def read_outputs(outputs: Iterable[dict[str, Tensor]]) -> list[Boxes]:
    """Turn one batch of torchvision detector outputs (corners in pixels) into one `Boxes` per image."""
    return [_make_boxes(output["boxes"], output["labels"], output["scores"]) for output in outputs]


def average_precision(truth: Sequence[Boxes], found: Sequence[Boxes]) -> dict[str, float]:
    """COCO figures of the detections `found`, image by image against `truth`; keys as in `evaluate`.

    Raises
    ------
    BatchError
        The two differ in length, or `truth` has no box at all.
    """
    if len(truth) != len(found):
        raise BatchError(f"{len(truth)} images have true boxes but {len(found)} have detections; give one per image.")
    if not any(len(boxes.labels) for boxes in truth):
        raise BatchError(
            f"None of the {len(truth)} images has a true box, so average precision is undefined;"
            " evaluate on annotated images."
        )
    categories = sorted({int(label) for boxes in truth for label in boxes.labels})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_make_coco(truth, categories), _make_coco(found, categories), iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    figures = {name: float(evaluator.stats[position]) for name, position in STATS.items()}
    return {name: value if value >= 0 else float("nan") for name, value in figures.items()}


def _make_coco(images: Sequence[Boxes], categories: list[int]) -> COCO:
    """A COCO index over `images`; written out because ``COCO.loadRes`` fails when there is no detection."""
    rows = [(image_id, row) for image_id, boxes in enumerate(images, 1) for row in _iterate_rows(boxes)]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in range(1, len(images) + 1)],
        "categories": [{"id": category} for category in categories],
        "annotations": [{"id": number, "image_id": image_id, **row} for number, (image_id, row) in enumerate(rows, 1)],
    }
    coco.createIndex()
    return coco


def _iterate_rows(boxes: Boxes) -> Iterator[dict[str, Any]]:
    for xywh, label, score in zip(boxes.xywh.tolist(), boxes.labels.tolist(), boxes.scores.tolist(), strict=True):
        yield {"category_id": label, "bbox": xywh, "area": xywh[2] * xywh[3], "iscrowd": 0, "score": score}


def _make_boxes(corners: Tensor, labels: Tensor, scores: Tensor) -> Boxes:
    xywh = corners.detach().to("cpu", torch.float64).reshape(-1, 4).clone()
    xywh[:, 2:] -= xywh[:, :2]
    return Boxes(
        xywh.numpy(), labels.detach().to("cpu", torch.int64).numpy(), scores.detach().to("cpu", torch.float64).numpy()
    )


def _read_target(item: Any, index: int) -> Boxes:
    """The true boxes of data set item `index`, checked."""
    try:
        _, target = item
        corners, labels = target["boxes"], target["labels"]
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise BatchError(
            f"Item {index} of the data set is not (image, dict with 'boxes' and 'labels'): {error!r}; convert it first."
        ) from error
    if labels.ndim != 1 or (tuple(corners.shape) != (len(labels), 4) and corners.numel() + len(labels) > 0):
        raise BatchError(
            f"Item {index} has boxes of shape {tuple(corners.shape)} and labels of shape {tuple(labels.shape)}; "
            "give (n, 4) and (n,)."
        )
    if corners.numel() and not bool((corners[:, 2:] > corners[:, :2]).all()):
        raise BatchError(f"Item {index} has a box with x2 <= x1 or y2 <= y1; give corners as x1, y1, x2, y2 in pixels.")
    return _make_boxes(corners, labels, torch.ones(len(labels)))


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, and every submodule back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
