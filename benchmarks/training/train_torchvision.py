"""The training loop of torchvision detectors: AdamW, a one-cycle schedule, a checkpoint after every epoch."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.cache import WEIGHTS_FILE
from benchmarks.detectors import Recipe
from fxprune.datasets.coco import CocoDataset
from fxprune.datasets.evaluation import evaluate

BATCH_SIZE = 16

Sample = tuple[Tensor, dict[str, Tensor]]
EpochEnd = Callable[[int, float, float], object]


def run(recipe: Recipe, folder: Path, digits: Path, options: argparse.Namespace) -> nn.Module:
    """Train by a recipe; continue from ``folder/checkpoint.pt`` if it exists."""
    torch.manual_seed(options.seed)
    model = recipe.build(recipe.size)
    start_from(model, recipe, folder.parent)
    train = CocoDataset.from_folder(digits / "train")
    samples = [train[index] for index in range(len(train))]
    val = CocoDataset.from_folder(digits / "val")

    def report(epoch: int, loss: float, seconds: float) -> None:
        scores = evaluate(model, val)
        row = {"epoch": epoch, "loss": round(loss, 4), "mAP": round(scores["mAP"], 4),
               "mAP50": round(scores["mAP50"], 4), "seconds": round(seconds)}  # fmt: skip
        print(json.dumps(row), flush=True)
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    fit(model, samples, report, recipe.learning_rate, folder / "checkpoint.pt", options)
    return model.to("cpu")


def start_from(model: nn.Module, recipe: Recipe, cache: Path) -> None:
    """Copy ImageNet weights, or the tensors of another trained detector that have the same name and shape.

    Raises
    ------
    SystemExit
        The other detector was not trained yet.
    """
    if recipe.imagenet is not None:
        copy_matching(model.get_submodule("backbone.body"), recipe.imagenet().state_dict())
    if recipe.start is not None:
        file = cache / recipe.start / WEIGHTS_FILE
        if not file.exists():
            raise SystemExit(f"{file} is missing; run `python -m benchmarks.training.train {recipe.start}` first.")
        copied = copy_matching(model, load_file(file))
        print(f"started with {copied} tensors of {recipe.start}", flush=True)


def copy_matching(model: nn.Module, state: dict[str, Tensor]) -> int:
    """Load the tensors of `state` that match a tensor of the model by name and shape; returns how many."""
    own = model.state_dict()
    matching = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(matching, strict=False)
    return len(matching)


def fit(
    model: nn.Module,
    samples: Sequence[Sample],
    report: EpochEnd,
    learning_rate: float,
    checkpoint: Path | None,
    options: argparse.Namespace,
) -> None:
    """Train `model` in place.

    Convolutions run in bfloat16. All random numbers depend on the seed and the epoch alone, so that an interrupted run
    gives the same weights as an uninterrupted one.

    Parameters
    ----------
    samples : sequence
        Images (3, H, W) in [0, 1] with their targets.
    report : callable
        ``(epoch from 1, mean loss, seconds)``.
    checkpoint : Path, optional
        Read if it exists and written after every epoch.
    options : Namespace
        ``epochs``, ``seed`` and ``device``.
    """
    device = torch.device(options.device)
    model.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    steps = len(samples) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=options.epochs * steps)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = restore(parts, checkpoint, device)
    for epoch in range(done + 1, options.epochs + 1):
        torch.manual_seed(options.seed * 1000 + epoch)
        generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
        started = time.perf_counter()
        loss = train_epoch(model, draw_batches(samples, generator, device), optimizer, schedule, bfloat16=True)
        report(epoch, loss, time.perf_counter() - started)
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"epoch": epoch}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    model.eval()


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    bfloat16: bool = False,
) -> float:
    """Take one optimizer step per batch, with gradients clipped to a norm of 10; returns the mean loss."""
    losses = []
    model.train()
    for images, targets in batches:
        with torch.autocast(images[0].device.type, torch.bfloat16, enabled=bfloat16):
            loss = torch.stack([part.sum() for part in model(images, targets).values()]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return fmean(losses)


def restore(parts: dict[str, Any], checkpoint: Path | None, device: torch.device) -> int:
    """Load a checkpoint into a model, its optimizer and its schedule; returns the number of epochs done."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True, map_location=device)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["epoch"])


def draw_batches(
    samples: Sequence[Sample], generator: torch.Generator, device: torch.device
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Draw the shuffled, augmented batches of one epoch; an incomplete last batch is left out."""
    order = torch.randperm(len(samples), generator=generator).tolist()
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        batch = [samples[index] for index in order[start : start + BATCH_SIZE]]
        images = [change_light(image, generator).to(device) for image, _ in batch]
        targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for _, target in batch]
        yield images, targets


def change_light(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change contrast, brightness and tint of an image (3, H, W) in [0, 1] at random. Digits are not mirrored."""
    contrast = 0.7 + 0.6 * torch.rand(1, generator=generator)
    shift = 0.2 * torch.rand(1, generator=generator) - 0.1
    tint = 0.85 + 0.3 * torch.rand(3, 1, 1, generator=generator)
    return (((image - 0.5) * contrast + 0.5 + shift) * tint).clamp(0, 1)
