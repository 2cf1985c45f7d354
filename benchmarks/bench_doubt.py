"""The standard error of the mAP that deeper cuts lose, by a bootstrap.

    python -m benchmarks.bench_doubt [MODEL ...]        # needs the detectors that benchmarks.bench_deeper keeps
    python -m benchmarks.bench_doubt --render           # the table alone

Bootstrap (Efron, 1979): as many images as there are val images are drawn from these with replacement, many times. The
unpruned and the healed detector are scored on each draw. The standard deviation of the difference is the standard
error.

Rows go to ``results/bench_doubt.jsonl``, one per healed detector, the table to ``results/doubt.md``. A row is made
again only if the detector's mAP in the results of `benchmarks.bench_deeper` has changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

import fxprune
from benchmarks.bench_deeper import KEPT, KEYS, add_cut_options, detector_folder
from benchmarks.results import RESULTS, Row, read_rows, write_all
from benchmarks.subjects import Subject, load_subjects
from fxprune.datasets.evaluation import Boxes, average_precision, collect_boxes

NAME = "bench_doubt"
DRAWS = 100
"""Of the bootstrap."""

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Measure the rows that the results lack, and render the table."""
    parser = argparse.ArgumentParser(description="Standard errors of the mAP that deeper cuts lose.")
    add_cut_options(parser)
    parser.set_defaults(strategies=["one_shot"])
    parser.add_argument("--heals", nargs="+", default=["affine"], choices=KEPT)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in () if options.render else load_subjects(options):
        measure(subject, [row for row in read_rows("bench_deeper") if is_wanted(row, subject, options)])
    (RESULTS / "doubt.md").write_text("\n".join(render_table(read_rows(NAME))) + "\n", encoding="utf-8")


def is_wanted(row: Row, subject: Subject, options: argparse.Namespace) -> bool:
    """Whether a row of `benchmarks.bench_deeper` is asked for, its detector is kept, and it is not measured yet."""
    asked = row["heal"] in options.heals and row["strategy"] in options.strategies and row["budget"] in options.budgets
    known = any(all(row[key] == other[key] for key in (*KEYS, "mAP")) for other in read_rows(NAME))
    return row["model"] == subject.name and asked and not known and detector_folder(row).exists()


def measure(subject: Subject, cuts: Sequence[Row]) -> None:
    """Measure the cuts of one detector and write their rows."""
    if not cuts:
        return
    truth, before = find_boxes(subject, subject.model)
    whole = bootstrap_map(truth, before)
    for cut in cuts:
        healed = fxprune.load(subject.model, detector_folder(cut))
        lost = whole - bootstrap_map(*find_boxes(subject, healed))
        row = {key: cut[key] for key in (*KEYS, "mAP", "unpruned_mAP", "val_images")}
        row |= {"draws": DRAWS, "standard_error": float(lost.std(ddof=1)), "mean_lost": float(lost.mean())}
        kept = [other for other in read_rows(NAME) if any(other[key] != row[key] for key in KEYS)]
        write_all(NAME, [*kept, row])
        console.print(
            f"{subject.name}: {cut['strategy']}, {cut['heal']}, {cut['budget']:.0%} {cut['cost']}: lost"
            f" {cut['unpruned_mAP'] - cut['mAP']:.3f} ± {row['standard_error']:.3f}"
        )


def find_boxes(subject: Subject, model: nn.Module) -> tuple[list[Boxes], list[Boxes]]:
    """Find the true and the detected boxes of the val images."""
    return collect_boxes(model.eval(), subject.val, image_size=subject.image_size)


def bootstrap_map(truth: Sequence[Boxes], found: Sequence[Boxes]) -> NDArray[np.float64]:
    """Compute the average precision on `DRAWS` draws of the images; the draws are the same in every call."""
    random = np.random.default_rng(0)
    draws = random.integers(len(truth), size=(DRAWS, len(truth))).tolist()
    return np.array([average_precision([truth[i] for i in draw], [found[i] for i in draw])["mAP"] for draw in draws])


def render_table(rows: Sequence[Row]) -> Iterator[str]:
    """Render one line per cut."""
    yield "| model | cut | healing | mAP lost | standard error |"
    yield "|---|---|---|--:|--:|"
    for row in sorted(rows, key=lambda row: [str(row[key]) for key in KEYS]):
        cut = f"{row['budget']:.0%} {row['cost']}, {row['strategy']}"
        lost = f"{row['unpruned_mAP'] - row['mAP']:.3f}"
        yield f"| {row['model']} | {cut} | {row['heal']} | {lost} | {row['standard_error']:.4f} |"


if __name__ == "__main__":
    main()
