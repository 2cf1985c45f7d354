"""Targets of the tasks of ultralytics: which labels a loss reads, and how the model's own outputs become labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.adapters.classifier import class_confidence
from fxprune.adapters.protocol import Batch, confidence_threshold, select_items
from fxprune.adapters.ultralytics.decoding import (
    BOX_COLUMNS,
    best_scores,
    decode_output,
    find_head,
    suppress_overlaps,
)
from fxprune.adapters.ultralytics.letterbox import clip
from fxprune.errors import ModelError

CONFIDENCE_THRESHOLD = 0.25
"""Least score of outputs that serve as labels (ultralytics' own prediction threshold)."""
VISIBLE = 0.5
"""Least score of a key point that counts as visible in a label."""

Targets = dict[str, Any]
Labelled = tuple[Targets, float | None]


@dataclass(frozen=True)
class Task:
    """A task of ultralytics.

    Attributes
    ----------
    keys : tuple of str
        Entries of a batch that its loss reads, next to ``img``.
    label : callable
        ``label(model, output, images) -> (targets, confidence)`` from the model's own output in eval mode. See `Batch`.
    columns : int
        Numbers per box in ``bboxes``; 0 if the task has no boxes.
    sums : bool
        Whether its loss is a sum over the images of the batch. Otherwise it is a mean.
    """

    keys: tuple[str, ...]
    label: Callable[[nn.Module, Any, Tensor], Labelled]
    columns: int = 4
    sums: bool = True


def task_of(network: nn.Module) -> Task:
    """Return the task of a network.

    Raises
    ------
    ModelError
        If it is not one of `TASKS`.
    """
    from ultralytics.nn.tasks import guess_model_task

    name = getattr(network, "task", None) or guess_model_task(network)
    if name not in TASKS:
        raise ModelError(f"{type(network).__name__} has the task {name!r}; known are {', '.join(TASKS)}: give loss=")
    return TASKS[name]


def confident_rows(network: nn.Module, output: Any, images: Tensor, rotated: bool = False) -> list[Tensor]:
    """Return the confident boxes of each image after non-maximum suppression, with all further columns.

    Parameters
    ----------
    network, output, images
        The network, its output in eval mode, and its input (N, C, H, W).
    rotated : bool
        Whether boxes have an angle. They are then centre, width and height; otherwise two corners.

    Returns
    -------
    list of Tensor
        One per image, (n, 6 or more): box in pixels, score, class, then masks' coefficients, key points or an angle.
    """
    boxes, rows = decode_output(network, output, *images.shape[-2:])
    least = confidence_threshold(CONFIDENCE_THRESHOLD, float(best_scores(network, boxes, rows).max()))
    return suppress_overlaps(
        network, boxes, rows, confidence=least, iou=0.45, limit=100, multi_label=False, rotated=rotated
    )


def targets_of_boxes(images: Tensor, found: list[Tensor]) -> Targets:
    """Make targets of boxes; rows are x1, y1, x2, y2 in pixels, a score or any number, the class."""
    height, width = images.shape[-2:]
    corners = torch.cat([clip(rows[:, :4], height, width) for rows in found])
    centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    scale = corners.new_tensor([width, height] * 2)
    return {**_counted(images, found), "bboxes": (torch.cat([centres, sides], 1) / scale).clamp(0, 1)}


def _counted(images: Tensor, found: list[Tensor]) -> Targets:
    index = torch.cat([rows.new_full((len(rows),), image) for image, rows in enumerate(found)])
    classes = torch.cat([rows[:, 5] for rows in found])
    return {"img": images, "cls": classes.float()[:, None], "batch_idx": index.float()}


def _best(found: list[Tensor]) -> float:
    """Return the score of the surest box."""
    return max((float(rows[:, 4].max()) for rows in found if len(rows)), default=0.0)


def _detect(network: nn.Module, output: Any, images: Tensor) -> Labelled:
    found = confident_rows(network, output, images)
    return targets_of_boxes(images, found), _best(found)


def _segment(network: nn.Module, output: Any, images: Tensor) -> Labelled:
    """Masks as ultralytics' data sets have them: per image one map of object numbers, small objects on top."""
    from ultralytics.utils.ops import process_mask

    protos, size = output[0][1], tuple(images.shape[-2:])
    overlap = bool(getattr(cast(Any, network).args, "overlap_mask", True))
    found, maps = [], []
    for rows, proto in zip(confident_rows(network, output, images), protos, strict=True):
        masks = process_mask(proto, rows[:, BOX_COLUMNS:], rows[:, :4], size)
        order = masks.flatten(1).sum(1, dtype=torch.long).argsort(descending=True)
        found.append(rows[order])
        maps.append(_paint(masks[order]) if overlap else masks[order])
    masks = torch.stack(maps) if overlap else torch.cat(maps)
    return {**targets_of_boxes(images, found), "masks": masks}, _best(found)


def _paint(masks: Tensor) -> Tensor:
    """Paint masks (n, h, w) one over the other into a map (h, w) of their numbers, from 1."""
    painted = masks.new_zeros(masks.shape[1:])
    for number, mask in enumerate(masks, 1):
        painted = torch.where(mask > 0, painted.new_tensor(number), painted)
    return painted


def _pose(network: nn.Module, output: Any, images: Tensor) -> Labelled:
    """Key points (n, K, 3): x and y divided by the image's size, and 2 for visible or 0."""
    found = confident_rows(network, output, images)
    shape = [int(size) for size in cast(Any, find_head(network)).kpt_shape]
    points = torch.cat([rows[:, BOX_COLUMNS:] for rows in found]).reshape(-1, *shape)
    height, width = images.shape[-2:]
    place = points[..., :2] / points.new_tensor([width, height])
    visible = (points[..., 2:3] >= VISIBLE).to(points) * 2 if shape[1] == 3 else torch.full_like(place[..., :1], 2)
    keypoints = torch.cat([place, visible], -1)[..., : shape[1]]
    return {**targets_of_boxes(images, found), "keypoints": keypoints}, _best(found)


def _obb(network: nn.Module, output: Any, images: Tensor) -> Labelled:
    """Boxes (n, 5): centre, width and height divided by the image's size, and the angle in radians."""
    found = confident_rows(network, output, images, rotated=True)
    rows = torch.cat(found)
    scale = rows.new_tensor([images.shape[-1], images.shape[-2]] * 2)
    boxes = torch.cat([rows[:, :4] / scale, rows[:, -1:]], 1)
    return {**_counted(images, found), "bboxes": boxes}, _best(found)


def _classify(network: nn.Module, output: Any, images: Tensor) -> Labelled:
    logits = output[-1] if isinstance(output, (list, tuple)) else output  # (probabilities, logits)
    return {"img": images, "cls": logits.argmax(1)}, class_confidence(logits)


def _semantic(network: nn.Module, output: Any, images: Tensor) -> Labelled:
    scores = output[0] if isinstance(output, (list, tuple)) else output
    return {"img": images, "semantic_mask": scores.argmax(1)}, None


def _depth(network: nn.Module, output: Any, images: Tensor) -> Labelled:
    raise ModelError(
        f"{type(network).__name__} has no loss on its own output, which it meets exactly: give labels as"
        " dict(img=..., depth=Tensor(N, H, W)), or loss="
    )


_BOXES = ("cls", "bboxes", "batch_idx")
TASKS: Mapping[str, Task] = {
    "detect": Task(_BOXES, _detect),
    "segment": Task((*_BOXES, "masks"), _segment),
    "pose": Task((*_BOXES, "keypoints"), _pose),
    "obb": Task(_BOXES, _obb, columns=5),
    "classify": Task(("cls",), _classify, columns=0, sums=False),
    "semantic": Task(("semantic_mask",), _semantic, columns=0),
    "depth": Task(("depth",), _depth, columns=0),
}
"""Tasks by the name that ultralytics gives them."""


def label(model: nn.Module, batch: Batch) -> Batch:
    """Use the model's own confident outputs as targets."""
    with torch.no_grad():
        output = model.eval()(batch.images)
        targets, confidence = task_of(model).label(model, output, batch.images)
        return Batch(batch.images, targets, batch.count, confidence=confidence)


def select_targets(model: nn.Module, batch: Batch, numbers: Sequence[int]) -> Targets:
    """Return the targets of some images: rows of boxes by their `batch_idx`, numbered anew, other values by image."""
    index = batch.targets["batch_idx"].reshape(-1) if task_of(model).columns else torch.zeros(0)
    overlap = getattr(getattr(model, "args", None), "overlap_mask", True)
    per_box = (*_BOXES, "keypoints", *(() if overlap else ("masks",))) if task_of(model).columns else ()
    rows = [torch.nonzero(index == number)[:, 0] for number in numbers]
    kept = torch.cat(rows) if rows else index.new_zeros(0, dtype=torch.long)
    found: Targets = {}
    for key, value in batch.targets.items():
        if key in per_box:
            found[key] = value[kept]
        elif isinstance(value, (Tensor, list, tuple)) and len(value) == batch.count:
            found[key] = select_items(value, numbers)
        else:
            found[key] = value
    if per_box:
        renumbered = [index.new_full((len(row),), place) for place, row in enumerate(rows)]
        found["batch_idx"] = torch.cat(renumbered) if rows else kept.to(index)
    return found
