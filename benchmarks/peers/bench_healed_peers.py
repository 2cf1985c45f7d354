"""Removed blocks with healing, and pruned channels with fine-tuning, compared at the same latency and training time.

    python -m benchmarks.peers.bench_healed_peers [MODEL ...]    # needs the detectors that bench_deeper keeps
    python -m benchmarks.peers.bench_healed_peers --render       # the table alone

The healed detectors are those of `benchmarks.bench_deeper`: pruned by fxprune and healed without labels. Of the
versions of Torch-Pruning (the peer) that are at least as fast, the one with the smallest pruning ratio is compared. All
versions are timed in turn, on a quiet machine.

The peer's version is fine-tuned on the same images, with their labels, for the processor time that search and healing
took together, at each of several learning rates. It is evaluated on the val images four times during each run, and the
best score counts. Every difference between the two sides is in the peer's favour.

Rows go to ``results/bench_healed_peers.jsonl``, the table to ``results/healed_peers.md``. If a detector has been healed
again after the comparison, the table shows its new mAP and seconds beside the peer's old ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from torch import nn

import fxprune
from benchmarks.bench_deeper import COSTS, KEPT, KEYS, add_cut_options, detector_folder
from benchmarks.bench_deeper import NAME as OURS
from benchmarks.peers.bench_peers import PEERS
from benchmarks.peers.channels import first_working_way, prune_channels, summarize_error
from benchmarks.results import RESULTS, Row, describe_machine, read_rows, write_all
from benchmarks.subjects import Subject, load_subjects
from benchmarks.training.finetune import finetune_for

NAME = "bench_healed_peers"
PEER = "taylor"
"""The importance of Torch-Pruning that keeps most mAP in ``results/peers.md``."""
SWEEP = (*(step / 20 for step in range(1, 15)), 0.8, 0.9)
"""Pruning ratios of Torch-Pruning."""
CUT_KEYS = ("regions", "unpruned_mAP")
"""Keys with equal values in rows of the same cut of the same detector."""

console = Console(stderr=True)


def main(argv: list[str] | None = None) -> None:
    """Compare the detectors asked for, replace the rows of the same cuts, and render the table."""
    parser = argparse.ArgumentParser(description="Healed blocks and fine-tuned channels at the same latency.")
    add_cut_options(parser)
    parser.add_argument("--costs", nargs="+", default=list(COSTS), choices=COSTS)
    parser.add_argument("--heals", nargs="+", default=list(KEPT), choices=KEPT)
    parser.add_argument("--sweep", nargs="+", type=float, default=list(SWEEP), help="pruning ratios of Torch-Pruning")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-4, 5e-4], help="of its fine-tuning")
    parser.add_argument("--rounds", type=int, default=31, help="of timing")
    parser.add_argument("--timed-images", type=int, default=8, help="images a batch while timing")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in () if options.render else load_subjects(options):
        rows = list(compare(subject, options))
        made = [cut_key(row) for row in rows]
        write_all(NAME, [*(row for row in read_rows(NAME) if cut_key(row) not in made), *rows])
    (RESULTS / "healed_peers.md").write_text(
        "\n".join(render_table(read_rows(NAME), read_rows(OURS))) + "\n", encoding="utf-8"
    )


def compare(subject: Subject, options: argparse.Namespace) -> Iterator[Row]:
    """Make the rows of one detector."""
    ours = {timing_name(row): row for row in read_rows(OURS) if is_asked(row, subject, options)}
    models = {key: fxprune.load(subject.model, detector_folder(row)).eval() for key, row in ours.items()}
    if not models:
        console.print(f"{subject.name}: bench_deeper has kept none")
        return
    channels, error = prune_by_peer(subject, options.sweep)
    console.print(f"{subject.name}: timing {len(models)} of ours beside {len(channels)} of theirs")
    timed = subject.time_beside({**models, **channels}, options.rounds, options.timed_images)
    console.print(f"{subject.name}: timed, now fine-tuning")
    for key, row in ours.items():
        seconds, limit = sum_seconds(row), timed.ratio(key).median
        columns = timed.row_columns(key)
        shared = {
            **{name: row[name] for name in (*KEYS, *CUT_KEYS)},
            "mAP": row["mAP"], "seconds": seconds, **columns, "rounds": options.rounds,
            "timed_images": options.timed_images, "images": row["images"], "val_images": row["val_images"],
            "machine": describe_machine(options.device), "error": error,
        }  # fmt: skip
        fast = [name for name in channels if timed.ratio(name).median <= limit]
        peer = finetune_peer(subject, channels[fast[0]], seconds, options.learning_rates) if fast else {}
        if fast:
            peer |= {"peer_ratio": float(fast[0]), "peer_latency_ratio": timed.ratio(fast[0]).median}
        console.print(f"{subject.name}: {key}, mAP {row['mAP']:.3f}, at {limit:.2f} of the time; {peer or error}")
        yield {**shared, **peer}


def is_asked(row: Row, subject: Subject, options: argparse.Namespace) -> bool:
    """Whether a row of `benchmarks.bench_deeper` is asked for and its detector is kept."""
    wanted = {
        "model": [subject.name],
        "strategy": options.strategies,
        "heal": options.heals,
        "budget": options.budgets,
        "cost": options.costs,
    }
    return all(row[key] in values for key, values in wanted.items()) and detector_folder(row).exists()


def cut_key(row: Row) -> tuple[str, str, str, float, str]:
    """Make the key of a row. A new row replaces an old one with the same key."""
    return row["model"], row["cost"], row["strategy"], row["budget"], row["heal"]


def sum_seconds(row: Row) -> float:
    """Sum the seconds of search and healing in a row of `benchmarks.bench_deeper`."""
    return float(row["search_seconds"] + row["heal_seconds"])


def find_last_healing(row: Row, ours: Sequence[Row]) -> Row:
    """Find mAP and seconds of the last healing of the same cut; `row` itself if there is none."""
    same = (other for other in reversed(ours) if all(other[key] == row[key] for key in (*KEYS, *CUT_KEYS)))
    return next(({"mAP": now["mAP"], "seconds": sum_seconds(now)} for now in same), row)


def timing_name(row: Row) -> str:
    """Make the name of a healed version in timings."""
    return f"{row['strategy']} {row['budget']:.0%} {row['cost']} {row['heal']}"


def prune_by_peer(subject: Subject, sweep: Sequence[float]) -> tuple[dict[str, nn.Module], str | None]:
    """Prune a detector by Torch-Pruning at every ratio of a sweep.

    Returns
    -------
    models : dict of str to Module
        By ratio, in rising order.
    error : str, optional
        Why there are none.
    """
    settings, batches = PEERS[PEER], subject.batches()
    prepared, failures = first_working_way(subject.model, batches, settings)
    if prepared is None:
        return {}, failures[-1][1]
    found: dict[str, nn.Module] = {}
    for ratio in sorted(sweep):
        try:
            found[str(ratio)] = prune_channels(prepared, settings, ratio)[0]
        except Exception as error:  # the peer may raise any exception
            console.print(f"{subject.name}: Torch-Pruning at {ratio}: {summarize_error(error)}")
    return found, None


def finetune_peer(subject: Subject, model: nn.Module, seconds: float, rates: Sequence[float]) -> Row:
    """Fine-tune a model at every rate and evaluate each look; the best score counts."""
    found: dict[str, float] = {}
    for rate in rates:
        try:
            for look, now in enumerate(finetune_for(seconds, model, subject.batches(), rate), start=1):
                found[f"{rate:g}, look {look}"] = subject.evaluate(now)["mAP"]
        except fxprune.FxpruneError as error:
            console.print(f"{subject.name}: at rate {rate}: {summarize_error(error)}")
    found["as pruned"] = subject.evaluate(model)["mAP"]
    best = max(found, key=found.__getitem__)
    return {"peer_pruned_mAP": found["as pruned"], "peer_mAP": found[best], "peer_best": best, "looks": found}


def render_table(rows: Sequence[Row], ours: Sequence[Row]) -> Iterator[str]:
    """Render one line per detector and cut, with the last healing of that cut."""
    yield "| model | strategy, heal | budget | latency | mAP | s | Torch-Pruning | and tuned | s | its latency |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for row in sorted(rows, key=cut_key):
        now = find_last_healing(row, ours)
        if row.get("peer_mAP") is None:
            theirs = ["fails" if row["error"] else "never that fast", "", "", ""]
        else:
            theirs = [f"{row['peer_pruned_mAP']:.3f}", f"{row['peer_mAP']:.3f}"]
            theirs += [f"{row['seconds']:.0f}", f"{row['peer_latency_ratio']:.2f}"]
        spread = f"{row['latency_ratio']:.2f} [{row['latency_ratio_low']:.2f}, {row['latency_ratio_high']:.2f}]"
        cells = [row["model"], f"{row['strategy']}, {row['heal']}", f"{row['budget']:.0%} {row['cost']}", spread]
        cells += [f"{now['mAP']:.3f}", f"{now['seconds']:.0f}"]
        yield f"| {' | '.join([*cells, *theirs])} |"


if __name__ == "__main__":
    main()
