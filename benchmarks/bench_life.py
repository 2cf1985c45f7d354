"""The life of a detector after the cut: healed, trained on, and quantized to INT8.

    python -m benchmarks.bench_life [--images 640] [--epochs 25] [--more 5] [--budget 0.3] [--steps 400] [--threads 1]

One YOLOv8n is trained on composed digits, and a fraction of its FLOPs is removed. Every healing is followed by no
training, by `--more` epochs of ultralytics' trainer, and by as many with ultralytics' own distillation from the
unpruned detector (``distill_model=``). The unpruned detector is trained equally long. Every result is also exported to
OpenVINO in INT8 by ultralytics. All healings use the first `--calibration` training images, with their labels where
they use labels. ``finetune`` is no healing of fxprune: it starts from ``affine`` and takes as many steps, on as many
images each, by the detector's loss alone.

``--time`` times the exported detectors in turn instead, in processor time. One JSON object per row goes to
``results/bench_life.jsonl``, and the tables to ``results/life.md``. Rows that exist already are not measured again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune
from benchmarks.cache import cache_folder, ensure_digits
from benchmarks.detectors import DETECTORS
from benchmarks.exported import OpenVino, export_openvino, replace_forward
from benchmarks.results import RESULTS, Row, append_row, describe_machine, read_rows
from benchmarks.subjects import TWIN, UNPRUNED, Items, Subject, read_items
from benchmarks.training.finetune import FineTuning
from benchmarks.training.train_ultralytics import TRAINER_SETTINGS, run, write_data
from fxprune.profiling.interleaved_timing import compute_ratio, interleave
from fxprune.runtime.private_copy import private_copy

NAME, MODEL = "bench_life", "yolov8n"
HEALS = ("none", "affine", "finetune", "mimic", "mimic_labelled")
TRAININGS = ("no", "trained", "distilled")
SETTINGS = ("images", "epochs", "more", "budget", "calibration", "steps", "seed")
"""Options that a row depends on."""
STEP_IMAGES, FINETUNE_LEARNING_RATE = 4, 1e-3
INT8_IMAGES = 300
"""Training images on which the ranges of INT8 are calibrated; NNCF's and ultralytics' recommendation."""


def main(argv: list[str] | None = None) -> None:
    """Measure the rows that the results lack, and write the tables."""
    parser = argparse.ArgumentParser(description="mAP of a pruned detector, healed, trained on and in INT8.")
    parser.add_argument("--images", type=int, default=640, help="training images")
    parser.add_argument("--epochs", type=int, default=25, help="of the training before the cut")
    parser.add_argument("--more", type=int, default=5, help="epochs of the training after the cut")
    parser.add_argument("--budget", type=float, default=0.3, help="fraction of the FLOPs to remove")
    parser.add_argument("--calibration", type=int, default=256, help="training images for scores and healing")
    parser.add_argument("--steps", type=int, default=400, help="of mimic, mimic_labelled and finetune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heals", nargs="*", default=list(HEALS), choices=HEALS)
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=TRAININGS)
    parser.add_argument("--time", action="store_true", help="time exported detectors")
    parser.add_argument("--rounds", type=int, default=201, help="of --time")
    parser.add_argument("--render", action="store_true", help="make the tables of existing rows")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not options.render:
        life = Life(options)
        if options.time:
            append_row(NAME, time_exported(life))
        else:
            measure(life)
    (RESULTS / "life.md").write_text("\n".join(render(read_rows(NAME))) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Life:
    """The detector before the cut, its images, and the versions that are made of it."""

    options: Namespace

    @cached_property
    def folder(self) -> Path:
        """Folder of all weights."""
        names = "-".join(str(getattr(self.options, name)) for name in ("images", "epochs", "seed"))
        return cache_folder() / "life" / names

    @cached_property
    def digits(self) -> Path:
        """Folder of the images."""
        return ensure_digits(DETECTORS[MODEL].size, self.options.images, self.options.seed)

    @cached_property
    def weights(self) -> Path:
        """Checkpoint of the trained detector; it is trained first if there is none."""
        file = self.folder / "run" / "weights" / "last.pt"
        if not (self.folder / "trained").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            settings = Namespace(epochs=self.options.epochs, seed=self.options.seed, device="cpu", restart=False)
            run(DETECTORS[MODEL], self.folder, self.digits, settings)
            (self.folder / "trained").touch()
        return file

    @cached_property
    def yolo(self) -> Any:
        """The unpruned detector as a `YOLO` object."""
        return load_yolo(self.weights)

    @cached_property
    def subject(self) -> Subject:
        """The network, with its images for evaluation and calibration."""
        val, train = (fxprune.CocoDataset.from_folder(self.digits / split) for split in ("val", "train"))
        calibration = read_items(train, self.options.calibration)
        return Subject(MODEL, self.yolo.model, read_items(val, None), calibration, DETECTORS[MODEL].size)

    @cached_property
    def batches(self) -> list[Any]:
        """The labelled batches, as small as the steps of a training."""
        images: Items = self.subject.calibration
        return list(fxprune.batches(self.yolo, images, batch_size=STEP_IMAGES, image_size=self.subject.image_size))

    @cached_property
    def cut(self) -> Any:
        """The pruned detector, not healed."""
        return fxprune.apply(self.yolo, fxprune.analyze(self.yolo, self.batches).plan(self.options.budget))

    def heal(self, name: str) -> tuple[Any, float]:
        """Heal the pruned detector; returns it with the processor seconds."""
        started = time.process_time()
        method = "affine" if name == "finetune" else name
        healed: Any = fxprune.heal(self.cut, self.yolo, self.batches, method, steps=self.options.steps)
        if name == "finetune":
            healed.model = finetune(healed.model, self.batches, self.options.steps, self.options.seed)
        return healed, time.process_time() - started

    def train(self, yolo: Any, training: str, folder: Path) -> tuple[Any, float]:
        """Train a version by ultralytics' trainer; returns it with the processor seconds."""
        started, recipe = time.process_time(), DETECTORS[MODEL]
        more = {"distill_model": str(self.weights)} if training == "distilled" else {}
        yolo.train(
            data=str(write_data(self.digits)), imgsz=recipe.size, epochs=self.options.more,
            batch=16, seed=self.options.seed, device="cpu", optimizer="AdamW", lr0=recipe.learning_rate / 2,
            cos_lr=True, warmup_epochs=1, val=False, project=str(folder), name="run", exist_ok=True,
            **TRAINER_SETTINGS, **more,
        )  # fmt: skip
        return load_yolo(folder / "run" / "weights" / "last.pt"), time.process_time() - started


def load_yolo(file: Path) -> Any:
    """Load a checkpoint, in float32 and eval mode."""
    from ultralytics import YOLO

    yolo = YOLO(file)
    yolo.model.float().eval()
    return yolo


def finetune(network: nn.Module, batches: Sequence[Any], steps: int, seed: int) -> nn.Module:
    """Train a copy for so many steps by its own loss; the learning rate falls linearly."""
    trainable = private_copy(network).requires_grad_(True)  # a loaded checkpoint has no gradients
    tuning, order = FineTuning(trainable, batches, FINETUNE_LEARNING_RATE, seed), list[int]()
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        order = order or torch.randperm(len(batches), generator=random).tolist()
        tuning.step(order.pop(), step, lr_scale=1 - step / steps)
    return tuning.model.eval()


def measure(life: Life) -> None:
    """Measure all rows that the results lack; each is written at once."""
    options = life.options
    for training in options.trainings:
        if training != "distilled":
            measure_row(life, UNPRUNED, training)
    for heal in options.heals:
        for training in options.trainings:
            measure_row(life, heal, training)


def measure_row(life: Life, heal: str, training: str) -> None:
    """Measure one row, unless the results have it."""
    settings = {name: getattr(life.options, name) for name in SETTINGS}
    known = {"model": MODEL, "heal": heal, "training": training, **settings}
    if any(known.items() <= row.items() for row in read_rows(NAME)):
        return
    folder = life.folder / f"{heal}-{training}"
    yolo, heal_seconds, train_seconds = start_of(life, heal, training)
    if training != "no":
        yolo, train_seconds = life.train(yolo, training, folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yolo.save(folder / "last.pt")
    scores = life.subject.evaluate(yolo.model.eval())
    quantized = export_openvino(folder / "last.pt", life.subject.image_size, write_data(life.digits), INT8_IMAGES)
    int8 = life.subject.evaluate(replace_forward(yolo.model, OpenVino(quantized, life.options.threads)))
    row = {
        **known, "heal_seconds": heal_seconds, "train_seconds": train_seconds, "mAP": scores["mAP"],
        "mAP50": scores["mAP50"], "int8_mAP": int8["mAP"], "int8_mAP50": int8["mAP50"],
        "val_images": len(life.subject.val), "machine": describe_machine(),
    }  # fmt: skip
    append_row(NAME, row)
    print(
        f"{heal}, {training}: mAP {row['mAP']:.3f}, INT8 {row['int8_mAP']:.3f};"
        f" {heal_seconds:.0f} + {train_seconds:.0f} s",
        flush=True,
    )


def start_of(life: Life, heal: str, training: str) -> tuple[Any, float, float]:
    """Return the version that a training starts from, and the processor seconds of healing and training so far.

    A healed version is kept as the row without training.
    """
    if heal == UNPRUNED:
        return load_yolo(life.weights), 0.0, 0.0
    kept = life.folder / f"{heal}-no" / "last.pt"
    if training == "no" or not kept.exists():
        return *life.heal(heal), 0.0
    rows = [row for row in read_rows(NAME) if (row.get("heal"), row.get("training")) == (heal, "no")]
    return load_yolo(kept), rows[-1]["heal_seconds"] if rows else 0.0, 0.0


def time_exported(life: Life) -> Row:
    """Time the unpruned and the pruned detector, exported in float and INT8, in turn on one image.

    The clock counts processor time, which other programs disturb less than wall time.
    """
    runs: dict[str, OpenVino] = {}
    size, data = life.subject.image_size, write_data(life.digits)
    for name, file in ((UNPRUNED, life.weights), ("pruned", life.folder / "mimic_labelled-no" / "last.pt")):
        for kind, images in (("float", 0), ("INT8", INT8_IMAGES)):
            runs[f"{name} {kind}"] = OpenVino(export_openvino(file, size, data, images), life.options.threads)
    runs[TWIN] = runs[f"{UNPRUNED} float"]
    image = life.subject.inference_batch(1)
    calls = {name: partial(model, image) for name, model in runs.items()}
    timings = interleave(calls, rounds=life.options.rounds, warmup=5, clock=time.process_time)
    base = timings[f"{UNPRUNED} float"]
    ratios = {name: compute_ratio(timing, base) for name, timing in timings.items()}
    return {
        "model": MODEL, "timed": True, "rounds": life.options.rounds, "machine": describe_machine(),
        "precision": runs[TWIN].precision,
        "ms": {name: timing.median_ms for name, timing in timings.items()},
        "ratio": {name: [ratio.median, ratio.low, ratio.high] for name, ratio in ratios.items()},
    }  # fmt: skip


def render(rows: Sequence[Row]) -> Iterator[str]:
    """Render one table per set of settings, and one of timings."""
    measured = [row for row in rows if "training" in row]
    for settings in dict.fromkeys(tuple(row[name] for name in SETTINGS) for row in measured):
        some = [row for row in measured if tuple(row[name] for name in SETTINGS) == settings]
        yield from render_scores(some)
    for row in rows:
        if row.get("timed"):
            said = f"OpenVINO, one image, {row['rounds']} rounds, processor time; float: {row['precision']};"
            yield from ("", f"{said} {row['machine']}.", "")
            yield from ("| detector | ms | relative to unpruned float |", "|---|--:|--:|")
            for name, (median, low, high) in row["ratio"].items():
                yield f"| {name} | {row['ms'][name]:.2f} | {median:.2f} [{low:.2f}, {high:.2f}] |"


def render_scores(rows: Sequence[Row]) -> Iterator[str]:
    """Render mAP, mAP in INT8 and seconds of every healing and training."""
    first, found = rows[0], {(row["heal"], row["training"]): row for row in rows}
    yield (
        f"YOLOv8n, {first['images']} images, {first['epochs']} epochs; {first['budget']:.0%} of FLOPs; {first['more']}"
        f" more epochs; {first['calibration']} images and {first['steps']} steps to heal. mAP / in INT8 / processor s."
    )
    yield from ("", f"| | {' | '.join(TRAININGS)} |", "|---|" + "--:|" * len(TRAININGS))
    for heal in (UNPRUNED, *HEALS):
        if any((heal, training) in found for training in TRAININGS):
            yield f"| {heal} | {' | '.join(format_cell(found.get((heal, training))) for training in TRAININGS)} |"
    yield ""


def format_cell(row: Row | None) -> str:
    """Format mAP, mAP in INT8 and seconds; – if they were not measured."""
    if row is None:
        return "–"
    return f"{row['mAP']:.3f} / {row['int8_mAP']:.3f} / {row['heal_seconds'] + row['train_seconds']:.0f}"


if __name__ == "__main__":
    main()
