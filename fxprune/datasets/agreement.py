"""Defines `agreement`: how much of what a model finds its pruned version still finds. It needs no labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import box_iou

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch, confidence_threshold
from fxprune.datasets.calibration import open_calibration
from fxprune.datasets.evaluation import Boxes, average_precision, make_boxes
from fxprune.errors import BatchError, ModelError

CONFIDENCE_THRESHOLD = 0.5
"""Least score of the original's boxes that serve as ground truth. If half the best score is less, that is used."""
FOUND_IOU, FOUND_SCORE = 0.5, 0.5
"""Least overlap with a box, and least share of its score, at which a box of the pruned model finds it again."""


@dataclass(frozen=True)
class Agreement:
    """How much of what a model finds its pruned version still finds.

    Attributes
    ----------
    share : float
        For a detector, the share of the boxes that are found again; for a classifier, the share of the images that get
        the same class.
    images : int
        Number of images.
    boxes : int or None
        Number of boxes of the unpruned model that it is confident of; None for a classifier.
    mAP : float or None
        COCO's mAP of the pruned model with these boxes as ground truth; None for a classifier.

    Examples
    --------
    >>> print(Agreement(0.953, 64, boxes=180, mAP=0.914))
    95.3% of 180 boxes found again in 64 images; mAP 0.914 with the unpruned model's boxes as truth
    >>> print(Agreement(0.984, 64))
    same class for 98.4% of 64 images
    """

    share: float
    images: int
    boxes: int | None = None
    mAP: float | None = None

    def __str__(self) -> str:
        images = f"{self.images} image{'s' * (self.images != 1)}"
        if self.boxes is None:
            return f"same class for {self.share:.1%} of {images}"
        found = f"{self.share:.1%} of {self.boxes} box{'es' * (self.boxes != 1)} found again in {images}"
        return f"{found}; mAP {self.mAP:.3f} with the unpruned model's boxes as truth"


def agreement(model: nn.Module, pruned: nn.Module, images: Iterable[Any]) -> Agreement:
    """Measure how much of what a model finds its pruned version still finds. Labels are not needed.

    Parameters
    ----------
    model, pruned : Module
        The model before and after pruning. Neither is changed; copies in float32 are compared.
    images : iterable
        Batches as for `fxprune.analyze`, with or without labels, or the output of `fxprune.batches`. Take images that
        the pruning did not use: on those that healing was fitted to, the agreement is higher.

    Returns
    -------
    Agreement
        For a detector: the boxes that the model is confident of (score .5 or more, or half its best score if that is
        less), and the share of these for which `pruned` has a box of the same class with an IoU of at least .5 and at
        least half the score. For a classifier: the share of images with the same top class. `print` shows one line. In
        several processes (`torch.distributed`), each measures by itself.

    Raises
    ------
    ModelError
        If the model outputs neither boxes in a form that `fxprune.analyze` knows nor logits (N, classes).
    BatchError
        If there is no image, a batch cannot be read, or the model finds no box in any image.

    Examples
    --------
    >>> from fxprune.demo.bundled import load_dataset, load_detector
    >>> model = load_detector()
    >>> images = batches(model, load_dataset("val"))[:2]                   # doctest: +SKIP
    >>> print(agreement(model, pruned, images))                            # doctest: +SKIP
    93.0% of 86 boxes found again in 32 images; mAP 0.905 with the unpruned model's boxes as truth
    """
    opened = open_calibration(model, images, None, name="images")
    original = opened.adapted
    version = original.copy_version(pruned)
    with original.running(grad=False), version.running(grad=False):
        outputs = [(find(original, batch), find(version, batch)) for batch in opened.image_batches()]
    return compare_outputs([own for own, _ in outputs], [found for _, found in outputs])


Found = list[Boxes] | Tensor
"""What a model finds in a batch: the boxes of each image, or the class of each image, a Tensor (N,)."""


def find(version: AdaptedModel, batch: Batch) -> Found:
    """Return the boxes, or else the classes, that a model finds in the images of a batch.

    Raises
    ------
    ModelError
        If the model is known to give neither.
    """
    rows = version.detections(batch)
    if rows is not None:
        return [to_boxes(row) for row in rows]
    classes = version.adapter.classes(version.module, batch)
    if classes is None:
        raise ModelError(
            f"agreement is known for detectors (boxes) and classifiers (logits of shape (N, classes)), not for this"
            f" {version.adapter.family}; compute a metric of your own with the model and with the pruned model"
        )
    return classes.cpu()


def compare_outputs(own: Sequence[Found], found: Sequence[Found]) -> Agreement:
    """Compare what two versions of a model found in the same batches.

    Parameters
    ----------
    own, found : sequence of Found
        Output of `find` for each batch, by the original and by the pruned model.

    Raises
    ------
    BatchError
        If the original finds no box in any image.
    """
    first, second = ([row for row in rows if isinstance(row, Tensor)] for rows in (own, found))
    if first:
        same = torch.cat(first) == torch.cat(second)
        return Agreement(float(same.double().mean()), len(same))
    truth = confident_boxes(join_boxes(own))
    images, boxes = len(truth), sum(len(row.labels) for row in truth)
    if not boxes:
        raise BatchError(
            f"the unpruned model finds no box in any of {images} images: give images of what it was trained on, in the"
            " value range and size of its training"
        )
    again = join_boxes(found)
    count = sum(_count_found(*pair) for pair in zip(truth, again, strict=True))
    return Agreement(count / boxes, images, boxes, average_precision(truth, again)["mAP"])


def join_boxes(found: Iterable[Found]) -> list[Boxes]:
    """Return the boxes of each image of all batches."""
    return [boxes for batch in found if not isinstance(batch, Tensor) for boxes in batch]


def to_boxes(output: dict[str, Tensor]) -> Boxes:
    """Convert one output of `Adapter.detections`. Boxes with NaN or infinity are left out."""
    known = output["scores"].isfinite() & output["boxes"].isfinite().all(1)
    return make_boxes(*(output[key][known] for key in ("boxes", "labels", "scores")))


def confident_boxes(found: Sequence[Boxes]) -> list[Boxes]:
    """Return the boxes of each image that the model is confident of."""
    best = max((float(boxes.scores.max()) for boxes in found if len(boxes.scores)), default=0.0)
    least = confidence_threshold(CONFIDENCE_THRESHOLD, best)
    return [_select(boxes, boxes.scores >= least) for boxes in found]


def _select(boxes: Boxes, keep: NDArray[np.bool_]) -> Boxes:
    return Boxes(boxes.xywh[keep], boxes.labels[keep], boxes.scores[keep], boxes.areas[keep], boxes.crowd[keep])


def _count_found(truth: Boxes, found: Boxes) -> int:
    """Count the boxes of `truth`, surest first, for which there is a box in `found` that was not taken yet."""
    if not len(truth.labels) or not len(found.labels):
        return 0
    fits = _overlaps(truth, found)
    fits[truth.labels[:, None] != found.labels] = 0
    fits[truth.scores[:, None] * FOUND_SCORE > found.scores] = 0
    count = 0
    for row in np.argsort(-truth.scores, kind="stable"):
        best = fits[row].argmax()
        if fits[row, best] >= FOUND_IOU:
            fits[:, best] = 0
            count += 1
    return count


def _overlaps(truth: Boxes, found: Boxes) -> Any:
    """Return the IoU (n, m) of each pair of boxes."""
    corners = [torch.from_numpy(np.hstack([boxes.xywh[:, :2], boxes.xywh[:, :2] + boxes.xywh[:, 2:]]))
               for boxes in (truth, found)]  # fmt: skip
    return box_iou(*corners).numpy()
