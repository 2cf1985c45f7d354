"""Tiny data sets in the form that ultralytics trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LABELS = "0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.3\n"
TRAINING: dict[str, Any] = {
    "imgsz": 64,
    "batch": 4,
    "workers": 0,
    "plots": False,
    "verbose": False,
    "device": "cpu",
    "optimizer": "SGD",
}
"""Settings of a short training."""


def write_data(folder: Path, names: Sequence[str], labels: str = LABELS, **more: Any) -> str:
    """Write four noise images for training and four for validation; return the path of their yaml."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / part / f"{index}.jpg")
            (folder / "labels" / part / f"{index}.txt").write_text(labels)
    settings = {"path": str(folder), "train": "images/train", "val": "images/val", "names": list(names)}
    (folder / "data.yaml").write_text(json.dumps({**settings, **more}))
    return str(folder / "data.yaml")


def count(network: Any) -> int:
    return sum(value.numel() for value in network.parameters())
