"""COCO evaluation of a detector: average precision over a data set, by pycocotools.

Inputs and outputs of an ultralytics model are processed as by its own ``val(rect=False)``: images are letterboxed
(stretched for query decoders), scores are at least .001, overlaps at most .7, and there are up to 300 boxes per image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxprune.adapters.registry import detector_adapter, unwrap
from fxprune.datasets.class_mapping import map_labels, match_classes
from fxprune.errors import BatchError

# Index of each figure in COCOeval.stats.
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
        Confidence in [0, 1], float64 of shape (n,); 1 for true boxes.
    areas : ndarray
        Area of the objects in pixels, float64 of shape (n,); determines which objects are small, medium and large.
    crowd : ndarray
        Bool of shape (n,): the box is of many objects; detections in it count neither as correct nor as wrong.
    """

    xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    labels: Mapping[int, int] | None = None,
    image_size: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Measure the average precision of a detector on a data set by COCO's rules (with pycocotools).

    Parameters
    ----------
    model : Module
        A detector of torchvision's convention (input: a list of image Tensors; output in eval mode: a list of dicts of
        ``boxes``, ``labels``, ``scores``), an ultralytics model, or a `YOLO` object. Train and eval modes are restored.
        Ultralytics' own ``val(rect=False)`` reports slightly different figures: it interpolates precision differently.
    dataset : map-style dataset
        Items are ``(image, target)``, as of `fxprune.CocoDataset`: a Tensor of shape (C, H, W) in [0, 1], and a
        dict of ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels and ``labels`` (n,); n may be 0. ``area`` (n,) and
        ``iscrowd`` (n,) are optional: by default, areas are those of the boxes, and there are no crowds. C is the
        number of channels that the model takes; for an ultralytics model of one channel, RGB becomes grey.
    labels : mapping of int to int, optional
        The label in the data set for each class number of the model. Detections of other classes are ignored; true
        boxes of other labels count as missed. By default, the model's ``names`` are matched with the data set's
        ``categories``, and a category without a class is an error. If either does not exist, labels are class numbers.
    image_size : int, optional
        Side in pixels of the square inputs of an ultralytics model, rounded up to a multiple of its stride; by default
        the size in its training. Torchvision's detectors resize images themselves and ignore this.
    batch_size : int
        Images per forward pass.
    progress : callable, optional
        Called after every batch with the number of evaluated images.

    Returns
    -------
    dict of str to float
        ``mAP`` (mean over IoU .50 to .95), ``mAP50``, ``mAP75``, ``mAP_small``, ``mAP_medium``, ``mAP_large`` (COCO's
        box areas) and ``mAR`` (100 detections per image), in [0, 1]; NaN for a size without boxes.

    Raises
    ------
    BatchError
        `batch_size` is less than 1, an item is malformed, or all boxes of the data set are of crowds.
    SettingError
        `labels` or `image_size` is wrong, or labels and classes cannot be matched by name.
    ModelError
        The model is not a detector.

    Examples
    --------
    >>> from fxprune.demo.bundled import load_dataset, load_detector
    >>> round(evaluate(load_detector(), load_dataset("val"))["mAP50"], 2)
    0.95
    """
    return average_precision(
        *collect_boxes(model, dataset, labels=labels, image_size=image_size, batch_size=batch_size, progress=progress)
    )


def collect_boxes(
    model: nn.Module,
    dataset: Any,
    *,
    labels: Mapping[int, int] | None = None,
    image_size: int | None = None,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[Boxes], list[Boxes]]:
    """Return the true and the detected boxes of every image; parameters and errors are those of `evaluate`."""
    network = unwrap(model)
    detect = _make_detect(network, dataset, labels, image_size)
    with _eval_mode(network), torch.inference_mode(False), torch.no_grad():
        return _run_detector(detect, dataset, batch_size, progress)


def _make_detect(
    network: nn.Module, dataset: Any, labels: Mapping[int, int] | None, image_size: int | None
) -> Callable[[list[Tensor]], list[Boxes]]:
    """Return a function that finds the boxes of a batch, with the labels of the data set."""
    adapter, classes = detector_adapter(network), match_classes(network, dataset, labels)

    def detect(images: list[Tensor]) -> list[Boxes]:
        return [make_boxes(**map_labels(output, classes)) for output in adapter.detect(network, images, image_size)]

    return detect


def _run_detector(
    detect: Callable[[list[Tensor]], list[Boxes]],
    dataset: Any,
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> tuple[list[Boxes], list[Boxes]]:
    """Return the true and the detected boxes of every image."""
    if batch_size < 1:
        raise BatchError(f"batch_size is {batch_size}; give 1 or more.")
    truth: list[Boxes] = []
    found: list[Boxes] = []
    for start in range(0, len(dataset), batch_size):
        items = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        truth += [_read_target(item, start + offset) for offset, item in enumerate(items)]
        found += detect([image for image, _ in items])
        if progress is not None:
            progress(len(found))
    return truth, found


def average_precision(truth: Sequence[Boxes], found: Sequence[Boxes]) -> dict[str, float]:
    """Return the COCO figures of the detections `found` for the true boxes `truth`; keys as in `evaluate`.

    Raises
    ------
    BatchError
        The two differ in length, or all boxes of `truth` are of crowds.
    """
    if len(truth) != len(found):
        raise BatchError(f"{len(truth)} images have true boxes but {len(found)} have detections; give one per image.")
    if all(boxes.crowd.all() for boxes in truth):
        raise BatchError(
            f"None of the {len(truth)} images has a true box (crowds aside), so average precision is undefined;"
            " evaluate on annotated images."
        )
    from pycocotools.cocoeval import COCOeval

    categories = sorted({int(label) for boxes in truth for label in boxes.labels})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_make_coco(truth, categories), _make_coco(found, categories), iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    figures = {name: float(evaluator.stats[position]) for name, position in STATS.items()}
    return {name: value if value >= 0 else float("nan") for name, value in figures.items()}


def _make_coco(images: Sequence[Boxes], categories: list[int]) -> Any:
    """Return a COCO index of `images`. ``COCO.loadRes`` is not used, because it fails if there are no detections."""
    from pycocotools.coco import COCO

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
    columns = (boxes.xywh, boxes.labels, boxes.scores, boxes.areas, boxes.crowd)
    for xywh, label, score, area, crowd in zip(*(column.tolist() for column in columns), strict=True):
        yield {"category_id": label, "bbox": xywh, "area": area, "iscrowd": int(crowd), "score": score}


def make_boxes(
    boxes: Tensor, labels: Tensor, scores: Tensor, area: Tensor | None = None, iscrowd: Tensor | None = None
) -> Boxes:
    """Return the boxes of one image. `boxes` is (n, 4), x1, y1, x2, y2; the other tensors are (n,)."""
    xywh = boxes.detach().to("cpu", torch.float64).reshape(-1, 4).clone()
    xywh[:, 2:] -= xywh[:, :2]
    areas = xywh[:, 2] * xywh[:, 3] if area is None else area.detach().to("cpu", torch.float64)
    crowd = torch.zeros(len(xywh)) if iscrowd is None else iscrowd.detach().cpu()
    return Boxes(
        xywh.numpy(),
        labels.detach().to("cpu", torch.int64).numpy(),
        scores.detach().to("cpu", torch.float64).numpy(),
        areas.numpy(),
        crowd.bool().numpy(),
    )


def _read_target(item: Any, index: int) -> Boxes:
    """Return the true boxes of the data set item `index`; raise `BatchError` if it is malformed."""
    try:
        _, target = item
        corners, labels = torch.as_tensor(target["boxes"]), torch.as_tensor(target["labels"])
        extras = {key: torch.as_tensor(target[key]) for key in ("area", "iscrowd") if key in target}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise BatchError(
            f"Item {index} of the data set is not (image, dict with 'boxes' and 'labels'): {error!r}; convert it first."
        ) from error
    if labels.ndim != 1 or (tuple(corners.shape) != (len(labels), 4) and corners.numel() + len(labels) > 0):
        raise BatchError(
            f"Item {index} has boxes of shape {tuple(corners.shape)} and labels of shape {tuple(labels.shape)}; "
            "give (n, 4) and (n,)."
        )
    for key, value in extras.items():
        if tuple(value.shape) != tuple(labels.shape):
            raise BatchError(
                f"Item {index} has {len(labels)} boxes but {key} of shape {tuple(value.shape)}; give (n,)."
            )
    if corners.numel() and not bool((corners[:, 2:] > corners[:, :2]).all()):
        raise BatchError(f"Item {index} has a box with x2 <= x1 or y2 <= y1; give corners as x1, y1, x2, y2 in pixels.")
    return make_boxes(corners, labels, torch.ones(len(labels)), **extras)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set `model` to eval mode; restore the mode of every submodule at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
