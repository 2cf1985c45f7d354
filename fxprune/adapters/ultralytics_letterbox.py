"""Fit images into the square an ultralytics model is fed, and boxes there and back.

As ultralytics validates with ``rect=False``: the long side is scaled to the square (bilinear, sides rounded up) and the
rest filled with grey on both sides; models that were trained on stretched images get stretched ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PADDING_GREY = 114


@dataclass(frozen=True)
class Placement:
    """Where an image came to lie in a square.

    Attributes
    ----------
    height, width : int
        Of the image, in pixels.
    size : int
        Side of the square.
    resized : tuple of int
        Height and width the image has in it.
    pad : tuple of int
        Grey pixels left and above.
    """

    height: int
    width: int
    size: int
    resized: tuple[int, int]
    pad: tuple[int, int]

    @property
    def gain(self) -> tuple[float, float]:
        """By how much the image was scaled, along x and y."""
        return self.resized[1] / self.width, self.resized[0] / self.height

    def to_square(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) as x1, y1, x2, y2 in pixels of the image, in pixels of the square."""
        return boxes * boxes.new_tensor(self.gain * 2) + boxes.new_tensor(self.pad * 2)

    def to_image(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) as x1, y1, x2, y2 in pixels of the square, in pixels of the image and clipped to it."""
        moved = (boxes - boxes.new_tensor(self.pad * 2)) / boxes.new_tensor(self.gain * 2)
        return clip(moved, self.height, self.width)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (n, 4) as x1, y1, x2, y2, cut off at the edges of an image."""
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height) * 2))


def compute_placement(height: int, width: int, size: int, stretch: bool) -> Placement:
    """Compute where an image of some height and width lies in a square of side `size`."""
    if stretch:
        return Placement(height, width, size, (size, size), (0, 0))
    scale = size / max(height, width)
    rows, columns = min(math.ceil(height * scale), size), min(math.ceil(width * scale), size)
    left, top = round((size - columns) / 2 - 0.1), round((size - rows) / 2 - 0.1)
    return Placement(height, width, size, (rows, columns), (left, top))


def letterbox(image: Tensor, size: int, stretch: bool = False) -> tuple[Tensor, Placement]:
    """Fit an image into a square.

    Parameters
    ----------
    image : Tensor
        Float RGB of shape (3, H, W) in [0, 1]; rounded to 8 bits, in which ultralytics resizes.
    size : int
        Side of the square, in pixels.
    stretch : bool
        Whether to stretch it instead of keeping its shape.

    Returns
    -------
    Tensor
        Float32 of shape (3, size, size) in [0, 1].
    Placement
        Where the image lies in it.

    Examples
    --------
    >>> square, placement = letterbox(torch.rand(3, 120, 160), 320)
    >>> square.shape, placement.resized, placement.pad
    (torch.Size([3, 320, 320]), (240, 320), (0, 40))
    """
    import cv2

    placement = compute_placement(image.shape[-2], image.shape[-1], size, stretch)
    pixels = np.ascontiguousarray((image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
    rows, columns = placement.resized
    if (rows, columns) != pixels.shape[:2]:
        pixels = np.asarray(cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_LINEAR))
    left, top = placement.pad
    square = np.full((size, size, 3), PADDING_GREY, dtype=np.uint8)
    square[top : top + rows, left : left + columns] = pixels
    return torch.from_numpy(square).permute(2, 0, 1).contiguous().float() / 255, placement
