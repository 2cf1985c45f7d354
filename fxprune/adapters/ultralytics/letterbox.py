"""Fits images into the square input of an ultralytics model, and converts boxes between image and square.

Same as ultralytics' validation with ``rect=False``: the long side is scaled to the square (bilinear, sides rounded up)
and both margins are filled with grey. Images are stretched for models that were trained on stretched images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.errors import BatchError

PADDING_GREY = 114


@dataclass(frozen=True)
class Placement:
    """Position and scale of an image in a square.

    Attributes
    ----------
    height, width : int
        Size of the image, in pixels.
    size : int
        Side of the square, in pixels.
    resized : tuple of int
        Height and width of the image in the square, in pixels.
    pad : tuple of int
        Number of grey pixels on the left and on the top.
    """

    height: int
    width: int
    size: int
    resized: tuple[int, int]
    pad: tuple[int, int]

    @property
    def gain(self) -> tuple[float, float]:
        """Scale factors of the image along x and y."""
        return self.resized[1] / self.width, self.resized[0] / self.height

    def to_square(self, boxes: Tensor) -> Tensor:
        """Convert boxes (n, 4), x1, y1, x2, y2, from pixels of the image to pixels of the square."""
        return boxes * boxes.new_tensor(self.gain * 2) + boxes.new_tensor(self.pad * 2)

    def to_image(self, boxes: Tensor) -> Tensor:
        """Convert boxes (n, 4), x1, y1, x2, y2, from pixels of the square to pixels of the image; clip to the image."""
        moved = (boxes - boxes.new_tensor(self.pad * 2)) / boxes.new_tensor(self.gain * 2)
        return clip(moved, self.height, self.width)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Clip boxes (n, 4), x1, y1, x2, y2 in pixels, to an image of this height and width."""
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height) * 2))


def compute_placement(height: int, width: int, size: int, stretch: bool) -> Placement:
    """Compute the placement of an image of this height and width in a square of side `size`, all in pixels."""
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
        Float of shape (C, H, W) in [0, 1]. It is rounded to 8 bits, because ultralytics resizes 8-bit images.
    size : int
        Side of the square, in pixels.
    stretch : bool
        Whether to stretch the image to the square. By default the aspect ratio is kept.

    Returns
    -------
    Tensor
        Float32 of shape (C, size, size) in [0, 1].
    Placement
        Position of the image in the square.

    Examples
    --------
    >>> square, placement = letterbox(torch.rand(3, 120, 160), 320)
    >>> square.shape, placement.resized, placement.pad
    (torch.Size([3, 320, 320]), (240, 320), (0, 40))
    """
    import cv2

    placement = compute_placement(image.shape[-2], image.shape[-1], size, stretch)
    pixels = _to_pixels(image)
    rows, columns = placement.resized
    if (rows, columns) != pixels.shape[:2]:
        pixels = np.asarray(cv2.resize(pixels, (columns, rows), interpolation=cv2.INTER_LINEAR))
        pixels = pixels.reshape(rows, columns, len(image))  # cv2 leaves out a single channel
    left, top = placement.pad
    square = np.full((size, size, len(image)), PADDING_GREY, dtype=np.uint8)
    square[top : top + rows, left : left + columns] = pixels
    return torch.from_numpy(square).permute(2, 0, 1).contiguous().float() / 255, placement


def match_channels(image: Tensor, channels: int) -> Tensor:
    """Convert an image to the number of channels that a model takes.

    Parameters
    ----------
    image : Tensor
        Float of shape (C, H, W) in [0, 1].
    channels : int
        Number of channels of the model's input.

    Returns
    -------
    Tensor
        The image itself if it has this number; the grey image (1, H, W) of RGB, as ultralytics reads images for models
        of one channel.

    Raises
    ------
    BatchError
        For other numbers. The message says what the model takes.

    Examples
    --------
    >>> match_channels(torch.rand(3, 4, 4), 1).shape
    torch.Size([1, 4, 4])
    """
    import cv2

    if len(image) == channels:
        return image
    if (len(image), channels) != (3, 1):
        raise BatchError(
            f"the model takes images of {channels} channels, the data set gives {len(image)}: give a data set whose"
            f" items are (Tensor({channels}, H, W), target), or batches of your own loader"
        )
    grey = cv2.cvtColor(_to_pixels(image), cv2.COLOR_RGB2GRAY)
    return torch.from_numpy(np.asarray(grey))[None].float() / 255


def _to_pixels(image: Tensor) -> np.ndarray:
    """Convert an image (C, H, W) in [0, 1] to 8-bit pixels (H, W, C)."""
    return np.ascontiguousarray((image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
