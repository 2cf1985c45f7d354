"""Time the versions again that `benchmarks.peers.bench_peers` has evaluated.

    python -m benchmarks.peers.retime_peers [MODEL ...] [--rounds 31]

Accuracy can be measured on a busy machine, latency cannot. Every version in ``results/bench_peers.jsonl`` is made again
from the regions or the pruning ratio in its row. All versions of a detector are timed in turn. Only the latencies of
the rows change.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import fxprune
from benchmarks.ablation import plan_removing
from benchmarks.peers import render_peers
from benchmarks.peers.bench_peers import PEERS
from benchmarks.peers.channels import first_working_way, prune_channels
from benchmarks.results import Row, describe_machine, read_rows, replace_rows
from benchmarks.subjects import UNPRUNED, Subject, add_options, load_subjects


def main(argv: list[str] | None = None) -> None:
    """Time the detectors asked for, write rows model by model, render."""
    parser = argparse.ArgumentParser(description="Latency of the versions that bench_peers has measured.")
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--timed-images", type=int, default=8, help="images a batch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in load_subjects(options):
        rows = [row for row in read_rows("bench_peers") if row["model"] == subject.name]
        replace_rows("bench_peers", subject.name, retime(subject, rows, options.rounds, options.timed_images))
    render_peers.main([])


def retime(subject: Subject, rows: list[Row], rounds: int, images: int) -> list[Row]:
    """Time the versions of one detector; returns its rows with new latencies."""
    latencies = subject.time_beside(rebuild_versions(subject, rows), rounds, images)
    new = {"rounds": rounds, "timed_images": images, "machine": describe_machine(str(subject.device))}
    return [
        row if row["kind"] == "failed" else {**row, **latencies.row_columns(version_key(row)), **new} for row in rows
    ]


def rebuild_versions(subject: Subject, rows: list[Row]) -> dict[str, nn.Module]:
    """Make every pruned version in the rows again."""
    batches = subject.batches()
    analysis = fxprune.analyze(subject.model, batches[:1], criterion="random")
    prepared = {peer: first_working_way(subject.model, batches, settings)[0] for peer, settings in PEERS.items()
                if any(row["method"] == f"torch-pruning {peer}" for row in rows)}  # fmt: skip
    models: dict[str, nn.Module] = {}
    for row in rows:
        if row["kind"] not in ("cut", "sweep") or version_key(row) in models:
            continue
        if row["regions"] is not None:
            models[version_key(row)] = fxprune.apply(subject.model, plan_removing(analysis, set(row["regions"]))).eval()
            continue
        peer = row["method"].removeprefix("torch-pruning ")
        ready = prepared[peer]
        if ready is None:
            raise ValueError(f"{row['method']} fails on {subject.name}, but the results have a row of it")
        models[version_key(row)] = prune_channels(ready, PEERS[peer], row["ratio"])[0]
    return models


def version_key(row: Row) -> str:
    """Make the key of a row's version; rows of the same version have the same key."""
    if row["kind"] == "unpruned":
        return UNPRUNED
    return f"{row['method']} {row['ratio']}" if row["regions"] is None else " + ".join(row["regions"])


if __name__ == "__main__":
    main()
