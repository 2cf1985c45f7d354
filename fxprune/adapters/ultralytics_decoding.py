"""From what an ultralytics network gives at inference to boxes: one reading for labels and for evaluation."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fxprune.errors import ModelError
from fxprune.graph.fx_utils import class_names

BOX_COLUMNS = 6
"""Of an end-to-end head's rows: four of a box, score, class."""

NMS_TIMEOUT_S = 3600.0
"""Per image, before ultralytics' suppression would give up and return fewer boxes."""


def find_head(network: nn.Module) -> Any:
    """The last layer of an ultralytics network; None where it is not a list of layers."""
    layers = getattr(network, "model", None)
    return layers[-1] if isinstance(layers, (nn.Sequential, nn.ModuleList)) and len(layers) else None


def has_queries(network: nn.Module) -> bool:
    """Whether the head is a decoder of queries: it gives boxes as shares of an image it saw stretched."""
    return hasattr(find_head(network), "num_queries")


def count_classes(network: nn.Module) -> int:
    """Number of classes the head tells apart."""
    known = getattr(find_head(network), "nc", None) or getattr(network, "nc", None) or len(cast(Any, network).names)
    return int(known)


def decode_output(network: nn.Module, output: Any, height: int, width: int) -> tuple[Tensor, bool]:
    """Bring a network's output to pixels.

    Parameters
    ----------
    network : Module
        Says by its head what the numbers are.
    output : Tensor or nested tuple
        As the network gave it in eval mode; of a tuple the first.
    height, width : int
        Of the images it was given.

    Returns
    -------
    Tensor
        Rows (N, k, 6 or more) of x1, y1, x2, y2, score, class; or columns (N, 4 + classes or more, k) of centre x,
        centre y, width, height and a score a class. In pixels.
    bool
        Whether it is rows, which need no suppression.

    Raises
    ------
    ModelError
        It is neither: the network is no detector of upright boxes.
    """
    while isinstance(output, (list, tuple)) and output:
        output = output[0]
    name, classes = type(network).__name__, count_classes(network)
    if any(part.endswith("head.OBB") for part in class_names(find_head(network) or network)):
        raise ModelError(
            f"{name} finds rotated boxes, of which fxprune has no reading; give a detector of upright boxes"
        )
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.ndim != 3:
        raise ModelError(f"{name} gave {shape} instead of boxes (N, channels, k) or (N, k, 6); give a detector")
    if has_queries(network) and output.shape[-1] == BOX_COLUMNS:
        centre, size = output[..., :2], output[..., 2:4]
        scale = output.new_tensor([width, height] * 2)
        corners = torch.cat([centre - size / 2, centre + size / 2], -1) * scale
        return torch.cat([corners, output[..., 4:]], -1), True
    rows = output.shape[-1] == BOX_COLUMNS or bool(getattr(network, "end2end", False))
    if not rows and output.shape[1] < 4 + classes:
        raise ModelError(f"{name} gave {shape}, not (N, 4 + {classes} classes, k) or (N, k, 6) boxes; give a detector")
    return output, rows


def best_scores(network: nn.Module, boxes: Tensor, rows: bool) -> Tensor:
    """Scores (N, k) of what `decode_output` gave: for columns the best class's."""
    return boxes[..., 4] if rows else boxes[:, 4 : 4 + count_classes(network)].amax(1)


def suppress_overlaps(
    network: nn.Module, boxes: Tensor, rows: bool, *, confidence: float, iou: float, limit: int, multi_label: bool
) -> list[Tensor]:
    """Drop unsure boxes and, of columns, all that overlap a better one of their class.

    Parameters
    ----------
    boxes, rows
        What `decode_output` gave.
    confidence : float
        Least score.
    iou : float
        Overlap from which the lesser box goes.
    limit : int
        Boxes an image at most, best first.
    multi_label : bool
        Whether one box may be of several classes.

    Returns
    -------
    list of Tensor
        One per image, (n, 6): x1, y1, x2, y2 in pixels, score, class.
    """
    from ultralytics.utils.nms import non_max_suppression

    found = non_max_suppression(
        boxes, conf_thres=confidence, iou_thres=iou, multi_label=multi_label, max_det=limit,
        nc=count_classes(network), max_time_img=NMS_TIMEOUT_S, end2end=rows,
    )  # fmt: skip
    return [image[:, :BOX_COLUMNS] for image in found]
