"""Small data sets in COCO format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def write_coco(images: Path, annotations: Path, count: int, size: tuple[int, int] = (96, 64)) -> None:
    """A COCO-format folder: noise with one dog an image."""
    images.mkdir(parents=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(1, count + 1):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number:06d}.jpg")
    annotations.write_text(json.dumps({
        "images": [
            {"id": n, "file_name": f"{n:06d}.jpg", "width": size[0], "height": size[1]} for n in range(1, count + 1)
        ],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 18, "bbox": [8, 4, 32, 24], "area": 600, "iscrowd": 0}
            for n in range(1, count + 1)
        ],
    }))  # fmt: skip


def make_coco(folder: Path) -> Path:
    for split in ("train", "val"):
        write_coco(folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json", count=2)
    return folder
