"""Trained detectors with their images, and the command-line options that choose both."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

import fxprune
from benchmarks.cache import ensure_calibration, ensure_digits, load_trained
from benchmarks.detectors import DETECTORS
from fxprune import CocoDataset
from fxprune.adapters.protocol import device_of
from fxprune.graph.fx_utils import map_tensors
from fxprune.profiling.interleaved_timing import Ratio, Timing, compute_ratio, interleave

BATCH_SIZE = 8
OFFICIAL = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "yolov8n.pt")
"""Detectors with released COCO weights that ``--coco`` takes if none is named."""

UNPRUNED, TWIN = "unpruned", "unpruned again"
"""Names of the unpruned detector in timings. It is timed twice, to measure noise."""


@dataclass(frozen=True, eq=False)
class Latencies:
    """Timings by name. The unpruned detector is among them twice: its ratio to itself is the A/A floor."""

    timings: Mapping[str, Timing]

    def ratio(self, name: str) -> Ratio:
        """Divide a version's latency by the unpruned detector's, round by round."""
        return compute_ratio(self.timings[name], self.timings[UNPRUNED])

    def row_columns(self, name: str) -> dict[str, float]:
        """Make the latency columns of a row: ratio and A/A floor as median and quartiles, and the median in ms."""
        ratio, floor = self.ratio(name), self.ratio(TWIN)
        return {
            "latency_ratio": ratio.median, "latency_ratio_low": ratio.low, "latency_ratio_high": ratio.high,
            "latency_ms": self.timings[name].median_ms,
            "floor": floor.median, "floor_low": floor.low, "floor_high": floor.high,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """A detector with the images that it is evaluated and calibrated on.

    Attributes
    ----------
    name : str
        Name of the detector.
    model : Module
        Trained, in eval mode.
    val : Items
        Images for evaluation.
    calibration : Items
        Other images, for calibration.
    image_size : int, optional
        Side in pixels of the images that an ultralytics model takes.
    """

    name: str
    model: nn.Module
    val: Items
    calibration: Items
    image_size: int | None

    def batches(self) -> list[Any]:
        """Make batches of the calibration images with labels, in the form the model takes."""
        return list(fxprune.batches(self.model, self.calibration, batch_size=BATCH_SIZE, image_size=self.image_size))

    def unlabelled_batches(self) -> list[Any]:
        """Make batches of the calibration images without labels."""
        pictures = fxprune.batches(
            self.model, self.calibration, batch_size=BATCH_SIZE, image_size=self.image_size, targets=False
        )
        return list(pictures)

    def evaluate(self, model: nn.Module, images: int | None = None) -> dict[str, float]:
        """Evaluate a version of the model on the val images, or on the first `images` of them; COCO's scores."""
        val = self.val if images is None else Items(self.val.rows[:images], self.val.categories)
        return fxprune.evaluate(model, val, image_size=self.image_size)

    @cached_property
    def unpruned_scores(self) -> dict[str, float]:
        """COCO's scores of the unpruned detector."""
        return self.evaluate(self.model)

    def inference_batch(self, images: int) -> Any:
        """Make one batch of val images as the model takes them at inference, on its device."""
        some = Items(self.val.rows[:images], self.val.categories)
        (batch,) = fxprune.batches(self.model, some, batch_size=images, image_size=self.image_size, targets=False)
        return map_tensors(batch["img"] if isinstance(batch, dict) else batch, lambda value: value.to(self.device))

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return device_of(self.model)

    def time_beside(self, models: Mapping[str, nn.Module], rounds: int, images: int) -> Latencies:
        """Time pruned versions and the unpruned detector in turn on one batch of so many images."""
        batch = self.inference_batch(images)
        everything = {UNPRUNED: self.model, TWIN: self.model, **models}
        with torch.inference_mode():
            return Latencies(
                interleave(
                    {name: partial(model.eval(), batch) for name, model in everything.items()},
                    rounds=rounds,
                    warmup=2,
                    device=self.device,
                )
            )


@dataclass(frozen=True, eq=False)
class Items:
    """Decoded items of a data set, held in memory."""

    rows: list[tuple[Tensor, dict[str, Any]]]
    categories: dict[int, str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        return self.rows[index]


def read_items(dataset: CocoDataset, limit: int | None) -> Items:
    """Decode the first `limit` images of a data set, or all."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return Items([dataset[index] for index in range(count)], dict(dataset.categories))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose detectors and data."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(DETECTORS)}; by default all")
    parser.set_defaults(untrained=False)
    parser.add_argument("--coco", type=Path, metavar="DIR", help="COCO 2017 (val2017, train2017 and annotations in DIR)"
                        " and released weights; MODEL is a torchvision detector or an ultralytics .pt")  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="val images of any COCO-format set")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="and their annotations")
    parser.add_argument("--calibration-images", type=Path, metavar="DIR")
    parser.add_argument("--calibration-annotations", type=Path, metavar="FILE")
    parser.add_argument("--calibration", type=int, default=64, metavar="N", help="calibration images (64)")
    parser.add_argument("--val", type=int, metavar="N", help="val images; by default all")
    parser.add_argument("--image-size", type=int, help="side in pixels, for ultralytics models on such a set (640)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where the detectors run")


def load_subjects(options: argparse.Namespace) -> Iterator[Subject]:
    """Load the detectors asked for, one at a time.

    Raises
    ------
    SystemExit
        Weights or images are missing. The message says which, and where they were looked for.
    """
    if options.coco is not None:
        options.images = options.images or options.coco / "val2017"
        options.annotations = options.annotations or options.coco / "annotations" / "instances_val2017.json"
        options.calibration_images = options.calibration_images or options.coco / "train2017"
        options.calibration_annotations = (
            options.calibration_annotations or options.coco / "annotations" / "instances_train2017.json"
        )
    if options.images is None:
        yield from (load_digits_subject(name, options) for name in options.models or DETECTORS)
        return
    try:
        val = read_items(CocoDataset(options.images, options.annotations), options.val)
        calibration = read_items(
            CocoDataset(options.calibration_images, options.calibration_annotations), options.calibration
        )
    except fxprune.FxpruneError as error:
        raise SystemExit(str(error)) from None
    for name in options.models or OFFICIAL:
        model = load_released(name).to(options.device)
        yield Subject(name.removesuffix(".pt"), model, val, calibration, options.image_size)


def load_digits_subject(name: str, options: argparse.Namespace) -> Subject:
    """Load one of the six trained detectors with its composed digits."""
    if name not in DETECTORS:
        raise SystemExit(f"{name!r} is none of the trained detectors: {', '.join(DETECTORS)}")
    size = DETECTORS[name].size
    model = build_untrained(name) if options.untrained else load_trained(name)
    val = CocoDataset.from_folder(ensure_digits(size) / "val")
    calibration = CocoDataset.from_folder(ensure_calibration(size, options.calibration))
    return Subject(
        name,
        model.to(options.device),
        read_items(val, options.val),
        read_items(calibration, options.calibration),
        image_size=size,
    )


def build_untrained(name: str) -> nn.Module:
    """Build one of the six with random weights from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DETECTORS[name].build(DETECTORS[name].size).eval()


def load_released(name: str) -> nn.Module:
    """Load a detector with its official COCO weights: torchvision's ``DEFAULT``, or an ultralytics ``.pt``.

    Raises
    ------
    SystemExit
        The weights are not on this machine and cannot be downloaded.
    """
    if name.endswith(".pt"):
        from ultralytics import YOLO
        from ultralytics.utils import SETTINGS

        try:
            network: nn.Module = YOLO(name).model
        except Exception as error:
            raise SystemExit(
                f"{name} is missing ({error}): looked in {Path.cwd()} and {SETTINGS['weights_dir']}; put the file there"
            ) from None
        return network.float().eval()
    known = models.list_models(models.detection)
    if name not in known:
        raise SystemExit(f"{name!r} is no detector of torchvision ({', '.join(known)}) and no ultralytics .pt file")
    weights = models.get_model_weights(name).DEFAULT
    try:
        model: nn.Module = models.get_model(name, weights=weights, weights_backbone=None)
        return model.eval()
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise SystemExit(
            f"the weights of {name} are missing ({error}): put {Path(weights.url).name} into {folder}"
        ) from None
