"""Training of ultralytics models by ultralytics' own trainer."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.detectors import Recipe

TRAINER_SETTINGS = {"mosaic": 0.0, "fliplr": 0.0, "plots": False, "amp": False, "workers": 0, "verbose": False}
"""Settings of the trainer. Digits are not mirrored; runs are too short for mosaics."""

SCORES = {"mAP": "mAP50-95", "mAP50": "mAP50"}
"""ultralytics' names of the scores that are logged."""


def run(recipe: Recipe, folder: Path, digits: Path, options: argparse.Namespace) -> nn.Module:
    """Train YOLOv8n by a recipe; continue an unfinished run from its last checkpoint."""
    keep_settings_in(folder)
    from ultralytics import YOLO

    last = folder / "run" / "weights" / "last.pt"
    if options.restart:
        last.unlink(missing_ok=True)
    model = YOLO(last if last.exists() else "yolov8n.yaml")
    model.add_callback("on_fit_epoch_end", lambda trainer: report(trainer, folder / "log.jsonl"))
    if not last.exists() or model.ckpt["epoch"] >= 0:  # a finished run is marked with epoch -1
        model.train(
            data=write_data(digits), imgsz=recipe.size, epochs=options.epochs, batch=16, seed=options.seed,
            device=options.device, optimizer="AdamW", lr0=recipe.learning_rate, cos_lr=True, warmup_epochs=1,
            project=str(folder), name="run", exist_ok=True, resume=last.exists(), **TRAINER_SETTINGS,
        )  # fmt: skip
    trained: nn.Module = YOLO(last).model
    return trained.float().cpu()


def keep_settings_in(folder: Path) -> None:
    """Let ultralytics write its settings into `folder` instead of the user's home, and work offline."""
    os.environ.setdefault("YOLO_CONFIG_DIR", str(folder))
    os.environ.setdefault("YOLO_OFFLINE", "1")


def report(trainer: Any, log: Path) -> None:
    """Append the scores of an epoch to the log."""
    scores = {name: round(trainer.metrics[f"metrics/{key}(B)"], 4) for name, key in SCORES.items()}
    row = {"epoch": trainer.epoch + 1, **scores, "seconds": round(trainer.epoch_time or 0)}
    print(json.dumps(row), flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_data(digits: Path) -> Path:
    """Write ``labels/*.txt`` beside the images of every split, and ``data.yaml``; returns the latter.

    Each line is a box: class from 0, then centre x, centre y, width and height as fractions of the image's sides.
    """
    for split in ("train", "val"):
        annotations = json.loads((digits / split / "annotations.json").read_text())
        lines: dict[int, list[str]] = {image["id"]: [] for image in annotations["images"]}
        images = {image["id"]: image for image in annotations["images"]}
        for box in annotations["annotations"]:
            width, height = images[box["image_id"]]["width"], images[box["image_id"]]["height"]
            x, y, w, h = box["bbox"]
            numbers = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines[box["image_id"]].append(" ".join([str(box["category_id"] - 1), *(f"{n:.6f}" for n in numbers)]))
        (digits / split / "labels").mkdir(exist_ok=True)
        for image_id, rows in lines.items():
            name = Path(images[image_id]["file_name"]).stem
            (digits / split / "labels" / f"{name}.txt").write_text("\n".join(rows))
    file = digits / "data.yaml"
    names = "".join(f"  {digit}: '{digit}'\n" for digit in range(10))
    file.write_text(f"path: {digits}\ntrain: train/images\nval: val/images\nnames:\n{names}")
    return file
