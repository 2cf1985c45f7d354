"""Decodes the inference output of an ultralytics network to boxes, for labels and for evaluation alike."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.errors import ModelError

BOX_COLUMNS = 6
"""Columns in a row of an end-to-end head: four for the box, score, class."""

NMS_TIMEOUT_S = 3600.0
"""Seconds per image after which ultralytics' suppression stops and returns fewer boxes."""


def find_head(network: nn.Module) -> Any:
    """Return the last layer of an ultralytics network; None if the network is not a list of layers."""
    layers = getattr(network, "model", None)
    return layers[-1] if isinstance(layers, (nn.Sequential, nn.ModuleList)) and len(layers) else None


def has_queries(network: nn.Module) -> bool:
    """Whether the head is a query decoder (RT-DETR). It returns boxes as fractions of the stretched image."""
    return hasattr(find_head(network), "num_queries")


def count_classes(network: nn.Module) -> int:
    """Return the number of classes of the head."""
    known = getattr(find_head(network), "nc", None) or getattr(network, "nc", None) or len(cast(Any, network).names)
    return int(known)


def decode_output(network: nn.Module, output: Any, height: int, width: int) -> tuple[Tensor, bool]:
    """Convert a network's output to boxes in pixels.

    Parameters
    ----------
    network : Module
        The network. Its head determines the format of the output.
    output : Tensor or nested tuple
        Output in eval mode; only the first item of a tuple is read.
    height, width : int
        Size of the input images, in pixels.

    Returns
    -------
    Tensor
        Rows (N, k, 6 or more) of x1, y1, x2, y2, score, class; or columns (N, 4 + classes or more, k) of centre x,
        centre y, width, height and one score per class. Boxes are in pixels.
    bool
        Whether the output is rows, which need no suppression.

    Raises
    ------
    ModelError
        If the output is neither, because the network is no detector of upright boxes.

    Examples
    --------
    >>> boxes, rows = decode_output(network, network(images), *images.shape[-2:])    # doctest: +SKIP
    """
    while isinstance(output, (list, tuple)) and output:
        output = output[0]
    name, classes = type(network).__name__, count_classes(network)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.ndim != 3:
        raise ModelError(f"{name} returned {shape} instead of boxes (N, channels, k) or (N, k, 6); give a detector")
    if has_queries(network) and output.shape[-1] == BOX_COLUMNS:
        centre, size = output[..., :2], output[..., 2:4]
        scale = output.new_tensor([width, height] * 2)
        corners = torch.cat([centre - size / 2, centre + size / 2], -1) * scale
        return torch.cat([corners, output[..., 4:]], -1), True
    rows = output.shape[-1] == BOX_COLUMNS or bool(getattr(network, "end2end", False))
    if not rows and output.shape[1] < 4 + classes:
        raise ModelError(
            f"{name} returned {shape}, not (N, 4 + {classes} classes, k) or (N, k, 6) boxes; give a detector"
        )
    return output, rows


def best_scores(network: nn.Module, boxes: Tensor, rows: bool) -> Tensor:
    """Return the scores (N, k) of an output of `decode_output`; for columns, the score of the best class."""
    return boxes[..., 4] if rows else boxes[:, 4 : 4 + count_classes(network)].amax(1)


def suppress_overlaps(
    network: nn.Module,
    boxes: Tensor,
    rows: bool,
    *,
    confidence: float,
    iou: float,
    limit: int,
    multi_label: bool,
    rotated: bool = False,
) -> list[Tensor]:
    """Remove boxes with low scores and, for columns, boxes that overlap a better box of the same class.

    Parameters
    ----------
    boxes, rows
        Output of `decode_output`.
    confidence : float
        Least score.
    iou : float
        Intersection over union above which the box with the lower score is removed.
    limit : int
        Largest number of boxes per image, best first.
    multi_label : bool
        Whether one box may have several classes.
    rotated : bool
        Whether the last column is an angle. Boxes are then centre, width and height.

    Returns
    -------
    list of Tensor
        One per image, (n, 6 or more): x1, y1, x2, y2 in pixels, score, class, and further columns of the head.

    Examples
    --------
    >>> options = {"confidence": 0.25, "iou": 0.7, "limit": 300, "multi_label": False}
    >>> found = suppress_overlaps(network, boxes, rows, **options)                     # doctest: +SKIP
    """
    from ultralytics.utils.nms import non_max_suppression

    found = non_max_suppression(
        boxes, conf_thres=confidence, iou_thres=iou, multi_label=multi_label, max_det=limit,
        nc=count_classes(network), max_time_img=NMS_TIMEOUT_S, end2end=rows, rotated=rotated,
    )  # fmt: skip
    return list(found)
