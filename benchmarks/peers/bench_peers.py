"""Block removal by fxprune and channel pruning by Torch-Pruning, compared on the same trained detectors.

    python -m benchmarks.peers.bench_peers [MODEL ...]              # composed digits; benchmarks.training.train first
    python -m benchmarks.peers.bench_peers --coco DIR [MODEL ...]   # COCO 2017 and released weights, where at hand
    python -m benchmarks.peers.retime_peers [MODEL ...]             # time the versions in the results again

Both tools see the same calibration images. Where they need gradients, these are of the same loss. For each budget the
pruning ratio of Torch-Pruning (the peer) is searched that saves as many FLOPs as fxprune's ``fisher``. A sweep over
ratios shows what the peer keeps at the same latency. All models of a detector are timed in turn, before fine-tuning.
All get the same short fine-tuning, the unpruned model included. Rows go to ``results/bench_peers.jsonl``, one for each
failure too. `benchmarks.peers.render_peers` makes ``results/peers.md`` of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fxprune
from benchmarks.ablation import analyze_by
from benchmarks.cache import ensure_digits
from benchmarks.detectors import DETECTORS
from benchmarks.peers import render_peers
from benchmarks.peers.channels import (
    PeerError,
    Settings,
    find_ratio,
    first_working_way,
    prune_channels,
    summarize_error,
)
from benchmarks.peers.handover import count_inference_flops
from benchmarks.results import Row, describe_machine, replace_rows
from benchmarks.subjects import UNPRUNED, Items, Subject, add_options, load_subjects
from benchmarks.training.finetune import finetune
from fxprune import CocoDataset
from fxprune.adapters.calls import normalize_and_label
from fxprune.adapters.registry import choose_adapter
from fxprune.profiling.flops_params import count_params

OURS = ("fisher", "ablation", "grad_act", "l1")
PEERS = {
    "taylor": Settings("taylor"),
    "taylor, round_to=8": Settings("taylor", round_to=8),
    "magnitude": Settings("magnitude"),
}
BUDGETS = (0.1, 0.2, 0.3)
SWEEP = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
"""Pruning ratios of Torch-Pruning, in rising order."""

console = Console(stderr=True)


@dataclass(frozen=True, eq=False)
class Variant:
    """One pruned version of a detector.

    Attributes
    ----------
    method : str
        Tool and criterion.
    kind : str
        ``unpruned``, ``cut`` (to a budget) or ``sweep``.
    key : str
        Equal for equal versions, which are measured once.
    model : Module
        In eval mode.
    budget : float, optional
        The fraction of FLOPs asked for.
    seconds : float
        Wall time of the pruning call.
    details : dict
        More keys of the row.
    """

    method: str
    kind: str
    key: str
    model: nn.Module
    budget: float | None
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Scores of a version, as pruned or fine-tuned; None if it failed, with the reason in `error`."""

    scores: Mapping[str, float | None]
    seconds: float | None = None
    error: str | None = None


def main(argv: list[str] | None = None) -> None:
    """Measure the detectors asked for, write rows model by model, render."""
    options = make_parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in load_subjects(options):
        started = time.perf_counter()
        replace_rows("bench_peers", subject.name, compare(subject, options, read_training(subject, options)))
        console.print(f"{subject.name}: {time.perf_counter() - started:.0f} s")
    render_peers.main([])


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description="Block removal against channel pruning by Torch-Pruning.")
    add_options(parser)
    parser.add_argument("--criteria", nargs="*", default=list(OURS), choices=list(OURS), help="of fxprune")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="of Torch-Pruning")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--sweep", nargs="+", type=float, default=list(SWEEP), help="pruning ratios of Torch-Pruning")
    parser.add_argument("--no-sweep", dest="sweep", action="store_const", const=[])
    parser.add_argument("--rounds", type=int, default=31, help="of timing")
    parser.add_argument("--timed-images", type=int, default=8, help="images a batch while timing")
    parser.add_argument("--finetune-images", type=int, default=512, help="training images, seen once; 0: none")
    parser.add_argument("--no-finetune-sweep", dest="finetune_sweep", action="store_false", help="tune cuts only")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of fine-tuning")
    return parser


def read_training(subject: Subject, options: argparse.Namespace) -> Sequence[Any]:
    """Read batches of 16 to fine-tune on.

    They come from the train split, or from the images that follow the calibration images in their data set.
    """
    if not options.finetune_images:
        return []
    if options.images is None:
        dataset, first = CocoDataset.from_folder(ensure_digits(DETECTORS[subject.name].size) / "train"), 0
    else:
        dataset = CocoDataset(options.calibration_images, options.calibration_annotations)
        first = options.calibration
    last = min(first + options.finetune_images, len(dataset))
    items = Items([dataset[index] for index in range(first, last)], dict(dataset.categories))
    return fxprune.batches(subject.model, items, batch_size=16, image_size=subject.image_size)


def compare(subject: Subject, options: argparse.Namespace, training: Sequence[Any]) -> list[Row]:
    """Make all rows of one detector."""
    batches = subject.batches()
    flops = partial(count_first_flops, batches=batches)
    unpruned = Variant("unpruned", "unpruned", UNPRUNED, subject.model, 0.0, 0.0)
    variants, failures = cut_blocks(subject, options)
    base = flops(subject.model)
    targets = {budget: budget for budget in options.budgets}
    targets |= {v.budget: 1 - flops(v.model) / base for v in variants if v.method == "fxprune fisher" and v.budget}
    for peer in options.peers:
        found, failed = cut_channels(subject.model, batches, peer, targets, options.sweep)
        variants += found
        failures += failed
    rows = list(measure(subject, [unpruned, *variants], training, options))
    images = {"calibration_images": len(subject.calibration), "val_images": len(subject.val)}
    shared = {"machine": describe_machine(options.device), **images}
    empty = dict.fromkeys(rows[0])
    return [{**empty, "model": subject.name, **row, **shared} for row in (*rows, *failures)]


def count_first_flops(model: nn.Module, batches: Sequence[Any]) -> int:
    """Count the FLOPs of one inference on the first calibration batch."""
    adapter = choose_adapter(model, batches[0], None)
    return count_inference_flops(model, adapter, normalize_and_label(model, adapter, batches[0], 0))


def cut_blocks(subject: Subject, options: argparse.Namespace) -> tuple[list[Variant], list[Row]]:
    """Remove blocks by every criterion of fxprune, at every budget."""
    variants, failures = [], []
    for criterion in options.criteria:
        started = time.perf_counter()
        analysis = analyze_by(criterion, subject.model, subject.batches())
        analyzed = time.perf_counter() - started
        for budget in options.budgets:
            started = time.perf_counter()
            try:
                plan = analysis.plan(budget)
            except fxprune.BudgetError as error:
                failures.append(make_failure(f"fxprune {criterion}", summarize_error(error), budget=budget))
                continue
            model = fxprune.apply(subject.model, plan).eval()
            seconds = analyzed + time.perf_counter() - started
            regions = sorted(region.name for region in plan.removed)
            variants.append(Variant(f"fxprune {criterion}", "cut", " + ".join(regions), model, budget, seconds,
                                    {"regions": regions}))  # fmt: skip
        console.print(f"{subject.name}: fxprune {criterion}, {analyzed:.1f} s")
    return variants, failures


def make_failure(method: str, error: str, **details: Any) -> Row:
    """Make a row of a failure, with the error message."""
    console.print(f"{method}: {error} {details}")
    return {"method": method, "kind": "failed", "heal": "none", "error": error, **details}


def cut_channels(
    model: nn.Module, batches: Sequence[Any], peer: str, targets: Mapping[float, float], sweep: Iterable[float]
) -> tuple[list[Variant], list[Row]]:
    """Prune channels by one importance of the peer: a sweep over ratios, and one version for each target.

    Parameters
    ----------
    targets : mapping of float to float
        For each budget the fraction of the FLOPs to save.
    """
    method, settings = f"torch-pruning {peer}", PEERS[peer]
    prepared, failed = first_working_way(model, batches, settings)
    failures = [make_failure(method, error, way=way.name) for way, error in failed]
    if prepared is None:
        return [], failures
    base, way = count_first_flops(model, batches), prepared.way.name
    variants: list[Variant] = []
    shares: dict[float, float] = {}

    def make(ratio: float, kind: str, budget: float | None) -> Variant | None:
        try:
            pruned, seconds = prune_channels(prepared, settings, ratio)
            shares[ratio] = 1 - count_first_flops(pruned, batches) / base
        except Exception as error:  # the peer may raise any exception
            failures.append(make_failure(method, summarize_error(error), way=way, ratio=ratio, budget=budget))
            return None
        details = {"ratio": ratio, "way": way, "version": version("torch-pruning")}
        return Variant(method, kind, f"{method} {ratio}", pruned, budget, seconds, details)

    def share_at(ratio: float) -> float | None:
        return None if make(ratio, "cut", None) is None else shares[ratio]

    made = [make(ratio, "sweep", None) for ratio in sweep]
    for budget, target in targets.items():
        try:
            ratio = find_ratio(target, share_at, shares)
        except PeerError as error:
            failures.append(make_failure(method, summarize_error(error), way=way, budget=budget))
            continue
        made.append(make(ratio, "cut", budget))
        console.print(f"{method}: {shares[ratio]:.3f} of the FLOPs saved at ratio {ratio:.3f}, asked for {target:.3f}")
    variants += [variant for variant in made if variant is not None]
    return variants, failures


def measure(
    subject: Subject, variants: Sequence[Variant], training: Sequence[Any], options: argparse.Namespace
) -> Iterator[Row]:
    """Evaluate, fine-tune and time every distinct version once; gives a row as pruned and one as fine-tuned."""
    distinct = {variant.key: variant for variant in variants}
    tuned = {v.key for v in variants if training and (v.kind != "sweep" or options.finetune_sweep)}
    batches = subject.batches()
    outcomes: dict[str, dict[str, Outcome]] = {}
    for key, variant in distinct.items():
        outcomes[key] = {"none": Outcome(evaluate_model(subject, variant.model))}
        if key in tuned:
            outcomes[key]["finetune"] = finetune_and_evaluate(subject, variant.model, training, options.learning_rate)
        figures = ", ".join(f"{heal}: mAP {outcome.scores['mAP']}" for heal, outcome in outcomes[key].items())
        console.print(f"{subject.name}: {len(outcomes)} of {len(distinct)}, {variant.method}, {figures}")
    models = {key: variant.model for key, variant in distinct.items()}
    latencies = subject.time_beside(models, options.rounds, options.timed_images)
    flops = {key: count_first_flops(variant.model, batches) for key, variant in distinct.items()}
    for variant in variants:
        for heal, outcome in outcomes[variant.key].items():
            yield {
                "model": subject.name, "method": variant.method, "kind": variant.kind, "budget": variant.budget,
                "heal": heal, **outcome.scores, "flops": flops[variant.key], "params": count_params(variant.model),
                **latencies.row_columns(variant.key), "rounds": options.rounds, "timed_images": options.timed_images,
                "seconds": variant.seconds, "finetune_images": options.finetune_images if heal == "finetune" else 0,
                "finetune_seconds": outcome.seconds, "learning_rate": options.learning_rate,
                "error": outcome.error, "ratio": None, "way": None, "regions": None, "version": None, **variant.details,
            }  # fmt: skip


def finetune_and_evaluate(subject: Subject, model: nn.Module, training: Sequence[Any], learning_rate: float) -> Outcome:
    """Fine-tune a copy and evaluate it. If the loss is not finite, the outcome has the error."""
    try:
        tuned, seconds = finetune(model, training, learning_rate)
    except fxprune.FxpruneError as error:
        return Outcome({"mAP": None, "mAP50": None}, error=summarize_error(error))
    return Outcome(evaluate_model(subject, tuned), seconds)


def evaluate_model(subject: Subject, model: nn.Module) -> dict[str, float | None]:
    """Evaluate a model; returns the two scores that rows hold."""
    figures = subject.evaluate(model)
    return {name: figures[name] for name in ("mAP", "mAP50")}


if __name__ == "__main__":
    main()
