"""Train one of the six detectors of `benchmarks.detectors` on composed digits.

    python -m benchmarks.training.train NAME [--epochs N] [--images 8000] [--seed 0] [--device cpu] [--threads 1]

Data, checkpoints, weights and the log of every epoch go to the cache folder (``FXPRUNE_CACHE``, by default
``~/.cache/fxprune``). An interrupted run continues after its last whole epoch; ``--restart`` starts again. Scores and
the weights' sha256 go to ``results/train.jsonl``.

The recipes use many images and few epochs, since small networks overfit 2,400 images. Two detectors start from the
weights of ``resnet50_ssdlite``. The detectors in the results were trained by these runs, some of them twice::

    python -m benchmarks.training.train resnet50_ssdlite --images 2400 --epochs 10
    python -m benchmarks.training.train resnet50_ssdlite --restart --start resnet50_ssdlite
    python -m benchmarks.training.train fasterrcnn_resnet50_fpn --images 4000
    python -m benchmarks.training.train retinanet_resnet50_fpn_v2 --images 4000
    python -m benchmarks.training.train retinanet_resnet50_fpn_v2 --restart --start retinanet_resnet50_fpn_v2
    python -m benchmarks.training.train shufflenet_v2_ssdlite
    python -m benchmarks.training.train shufflenet_v2_ssdlite --restart --start shufflenet_v2_ssdlite --epochs 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import replace

import torch
from safetensors.torch import save_file

from benchmarks.cache import WEIGHTS_FILE, cache_folder, ensure_digits
from benchmarks.detectors import DETECTORS
from benchmarks.results import replace_rows
from fxprune.datasets.coco import CocoDataset
from fxprune.datasets.evaluation import evaluate


def main(argv: list[str] | None = None) -> None:
    """Train, save and log one detector."""
    parser = argparse.ArgumentParser(description="Train a detector on composed digits.")
    parser.add_argument("name", choices=DETECTORS)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--images", type=int, default=8000, help="training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="one thread keeps CPU runs reproducible")
    parser.add_argument("--restart", action="store_true", help="start again instead of continuing")
    parser.add_argument("--start", choices=DETECTORS, help="start from this one's weights, which may be its own")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    recipe = DETECTORS[options.name]
    if options.start is not None:
        recipe = replace(recipe, start=options.start, imagenet=None)
    options.epochs = options.epochs or recipe.epochs
    started = time.perf_counter()
    folder = cache_folder() / options.name
    folder.mkdir(parents=True, exist_ok=True)
    if options.restart:
        for file in ("checkpoint.pt", "log.jsonl"):
            (folder / file).unlink(missing_ok=True)
    digits = ensure_digits(recipe.size, options.images, options.seed)
    if options.name.startswith("yolo"):
        from benchmarks.training.train_ultralytics import run
    else:
        from benchmarks.training.train_torchvision import run
    model = run(recipe, folder, digits, options)
    scores = evaluate(model.eval(), CocoDataset.from_folder(digits / "val"), image_size=recipe.size)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS_FILE
    )
    row = {
        "model": options.name, "size": recipe.size, "epochs": options.epochs, "images": options.images,
        "seed": options.seed, "start": recipe.start or ("imagenet" if recipe.imagenet else "random"),
        "device": options.device, "mAP": round(scores["mAP"], 4), "mAP50": round(scores["mAP50"], 4),
        "seconds": round(time.perf_counter() - started),
        "sha256": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
    }  # fmt: skip
    replace_rows("train", options.name, [row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
