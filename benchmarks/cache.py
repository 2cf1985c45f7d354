"""The cache folder: composed digits and trained weights, kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from benchmarks.data import SPLITS, DigitsConfig, load_sources, write_split
from benchmarks.detectors import DETECTORS

WEIGHTS_FILE = "weights.safetensors"


def cache_folder() -> Path:
    """Where data and weights are kept: ``FXPRUNE_CACHE``, by default ``~/.cache/fxprune``."""
    return Path(os.environ.get("FXPRUNE_CACHE", Path.home() / ".cache" / "fxprune"))


def ensure_digits(size_px: int, images: int = 8000, seed: int = 0) -> Path:
    """Compose the data set if the cache lacks it; returns its folder, with one sub-folder per split."""
    folder = cache_folder() / f"digits-{size_px}px-{images}-seed{seed}"
    if not (folder / "done").exists():
        config, sources = DigitsConfig(size=size_px, train=images, seed=seed), load_sources()
        for split in SPLITS:
            write_split(folder / split, config, sources, split)
        (folder / "done").touch()
    return folder


def ensure_calibration(size_px: int, images: int, seed: int = 0) -> Path:
    """Compose calibration images if the cache lacks them; returns their folder.

    The first ones are the calibration images of `ensure_digits`.
    """
    folder = cache_folder() / f"digits-{size_px}px-calibration{images}-seed{seed}"
    if not (folder / "annotations.json").exists():
        write_split(folder, DigitsConfig(size=size_px, calibration=images, seed=seed), load_sources(), "calibration")
    return folder


def load_trained(name: str) -> nn.Module:
    """Load the trained detector `name` from the cache, in eval mode.

    Raises
    ------
    SystemExit
        It was not trained yet. The message says how to train it.
    """
    file = cache_folder() / name / WEIGHTS_FILE
    if not file.exists():
        raise SystemExit(f"{file} is missing; run `python -m benchmarks.training.train {name}` first.")
    model = DETECTORS[name].build(DETECTORS[name].size)
    model.load_state_dict(load_file(file))
    return model.eval()
