"""The mAP and latency of trained detectors, pruned by each criterion at each budget, without training afterwards.

    python -m benchmarks.bench_paper [MODEL ...]                    # composed digits; benchmarks.training.train first
    python -m benchmarks.bench_paper --coco DIR [MODEL ...]         # COCO 2017 and released weights
    python -m benchmarks.bench_paper --reuse [MODEL ...]            # evaluate only cuts that the results lack
    python -m benchmarks.bench_paper --retime [MODEL ...]           # only time the cuts in the results again

Criteria see the calibration images only; mAP is of the val images. Rows go to ``results/bench_paper.jsonl``. The mAP
lost by the removal of each region alone goes to ``results/bench_paper_regions.jsonl``. The criterion ``oracle`` takes
these losses as scores. It is a bound: no other scores that are added up can do much better. `benchmarks.render_paper`
makes the tables and figures of the rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import nn

import fxprune
from benchmarks import render_paper
from benchmarks.ablation import analyze_by, plan_removing
from benchmarks.results import Row, describe_machine, read_rows, replace_rows
from benchmarks.subjects import UNPRUNED, Subject, add_options, load_subjects
from fxprune.planning.analysis import Analysis

CRITERIA = ("random", "l1", "grad_act", "grad_delta", "fisher", "ablation")
BLIND = ("random", "l1")
"""Criteria that do not use the images. One batch is enough for these, to find the regions."""
BUDGETS = (0.1, 0.2, 0.3)
NO_HEALING = {"strategy": "one_shot", "heal": "none", "cost": "flops"}

console = Console(stderr=True)


@dataclass(frozen=True)
class Cut:
    """One way to prune: criterion and seed, budget, plan, and the seconds of the analysis."""

    criterion: str
    seed: int
    budget: float
    plan: fxprune.Plan
    seconds: float

    @property
    def regions(self) -> frozenset[str]:
        """Names of the removed regions."""
        return frozenset(region.name for region in self.plan.removed)


def main(argv: list[str] | None = None) -> None:
    """Measure the detectors asked for, write rows model by model, and render the tables."""
    parser = argparse.ArgumentParser(description="mAP, cost and latency of pruned detectors, by criterion and budget.")
    add_options(parser)
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--random-seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--timed-images", type=int, default=8, help="images a batch while timing")
    parser.add_argument("--agreement", type=int, default=100, metavar="N",
                        help="val images for the removal of each region alone; 0: do not measure it")  # fmt: skip
    parser.add_argument("--reuse", action="store_true", help="keep the rows of other criteria, and take known mAP from"
                        " the results; weights and images must be the same")  # fmt: skip
    parser.add_argument("--retime", action="store_true", help="only time the cuts in the results again")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in load_subjects(options):
        started = time.perf_counter()
        if options.retime:
            retime(subject, options)
            continue
        analyses, cuts = analyze_and_plan(subject, options)
        if options.agreement:
            known = (
                {row["region"]: row for row in read_model_rows("bench_paper_regions", subject)} if options.reuse else {}
            )
            drops = remove_each(subject, analyses, options.agreement, known)
            replace_rows("bench_paper_regions", subject.name, drops)
            cuts += plan_budgets(options.budgets, rescore_by_drops(next(iter(analyses.values())), drops), "oracle")
        models = {cut.regions: fxprune.apply(subject.model, cut.plan) for cut in cuts}
        rows = list(evaluate_cuts(subject, cuts, models, read_known_scores(subject) if options.reuse else {}))
        timed = list(add_latencies(subject, rows, models, options))
        made = {row["criterion"] for row in timed}
        others = [row for row in read_model_rows("bench_paper", subject) if row["criterion"] not in made]
        replace_rows("bench_paper", subject.name, [*timed, *(others if options.reuse else ())])
        console.print(f"{subject.name}: {time.perf_counter() - started:.0f} s")
    render_paper.main([])


def analyze_and_plan(subject: Subject, options: argparse.Namespace) -> tuple[dict[str, Analysis], list[Cut]]:
    """Analyze once per criterion and seed, and plan for every budget."""
    analyses: dict[str, Analysis] = {}
    cuts: list[Cut] = []
    batches = subject.batches()
    for criterion in options.criteria:
        seen = batches[:1] if criterion in BLIND else batches
        for seed in range(options.random_seeds if criterion == "random" else 1):
            started = time.perf_counter()
            analysis = analyze_by(criterion, subject.model, seen, seed)
            seconds = time.perf_counter() - started
            analyses.setdefault(criterion, analysis)
            cuts += plan_budgets(options.budgets, analysis, criterion, seed, seconds)
            console.print(f"{subject.name}: {criterion} {seed}, {seconds:.1f} s")
    return analyses, cuts


def read_known_scores(subject: Subject) -> dict[frozenset[str], Mapping[str, float]]:
    """Read known scores from the results, by the regions removed, where the val images are the same."""
    rows = read_model_rows("bench_paper", subject)
    return {frozenset(row["regions"]): row for row in rows if row["val_images"] == len(subject.val)}


def read_model_rows(name: str, subject: Subject) -> list[Row]:
    """Read the rows of one detector from the results."""
    return [row for row in read_rows(name) if row["model"] == subject.name]


def plan_budgets(
    budgets: Iterable[float], analysis: Analysis, criterion: str, seed: int = 0, seconds: float = 0.0
) -> Iterator[Cut]:
    """Plan for every budget. Budgets that cannot be met are printed and left out."""
    for budget in budgets:
        try:
            yield Cut(criterion, seed, budget, analysis.plan(budget), seconds)
        except fxprune.BudgetError as error:
            console.print(f"{criterion}: {error}")


def evaluate_cuts(
    subject: Subject,
    cuts: Sequence[Cut],
    models: Mapping[frozenset[str], nn.Module],
    known: Mapping[frozenset[str], Mapping[str, float]],
) -> Iterator[Row]:
    """Evaluate every distinct cut once; gives a row of the unpruned model and one of each cut, without latencies."""
    everything = {frozenset[str](): subject.model, **models}
    scores: dict[frozenset[str], Mapping[str, float]] = {}
    for regions, model in everything.items():
        scores[regions] = known[regions] if regions in known else subject.evaluate(model)
        console.print(f"{subject.name}: {len(scores)} of {len(everything)}, mAP {scores[regions]['mAP']:.3f}")
    unpruned = Cut("none", 0, 0.0, replace(cuts[0].plan, regions=()), 0.0)
    for cut in (unpruned, *cuts):
        total = cut.plan.before if cut is unpruned else cut.plan.after
        yield {
            "model": subject.name,
            "criterion": cut.criterion,
            "seed": cut.seed,
            "budget": cut.budget,
            **NO_HEALING,
            "mAP": scores[cut.regions]["mAP"],
            "mAP50": scores[cut.regions]["mAP50"],
            "flops": total.flops,
            "params": total.params,
            "regions": sorted(cut.regions),
            "seconds": cut.seconds,
            "images": len(subject.calibration),
            "val_images": len(subject.val),
        }


def add_latencies(
    subject: Subject, rows: Sequence[Row], models: Mapping[frozenset[str], nn.Module], options: argparse.Namespace
) -> Iterator[Row]:
    """Time all models and add their latencies to the rows."""
    named = {join_names(regions): model for regions, model in models.items()}
    latencies = subject.time_beside(named, options.rounds, options.timed_images)
    for row in rows:
        columns = latencies.row_columns(join_names(row["regions"]))
        yield row | columns | {"timed_images": options.timed_images, "machine": describe_machine(options.device)}


def retime(subject: Subject, options: argparse.Namespace) -> None:
    """Make the cuts in the results again and time them, on a quiet machine."""
    rows = read_model_rows("bench_paper", subject)
    analysis = fxprune.analyze(subject.model, subject.batches()[:1], criterion="random")
    models = {
        regions: fxprune.apply(subject.model, plan_removing(analysis, set(regions)))
        for regions in {frozenset(row["regions"]) for row in rows} - {frozenset()}
    }
    replace_rows("bench_paper", subject.name, add_latencies(subject, rows, models, options))


def join_names(regions: Iterable[str]) -> str:
    """Make one name for a set of regions."""
    return " + ".join(sorted(regions)) or UNPRUNED


def remove_each(subject: Subject, analyses: Mapping[str, Analysis], images: int, known: Mapping[str, Row]) -> list[Row]:
    """Measure the mAP lost by the removal of each region alone; rows have the scores of all criteria beside it."""
    first = next(iter(analyses.values()))
    known = {name: row for name, row in known.items() if row["val_images"] == images}
    complete = known.keys() >= {region.name for region in first.regions}
    whole = 0.0 if complete else subject.evaluate(subject.model, images)["mAP"]
    scores = {name: {region.name: region.score for region in a.regions} for name, a in analyses.items()}
    rows = []
    for index, region in enumerate(first.regions, 1):
        scored = {name: found[region.name] for name, found in scores.items() if region.name in found}
        if region.name in known:
            drop, scored = known[region.name]["mAP_drop"], known[region.name]["scores"] | scored
        else:
            pruned = fxprune.apply(subject.model, plan_removing(first, {region.name}))
            drop = whole - subject.evaluate(pruned, images)["mAP"]
        rows.append({
            "model": subject.name, "region": region.name, "kind": region.kind, "block": region.block,
            "flops_share": region.flops / first.before.flops, "params": region.params,
            "mAP_drop": drop, "scores": scored, "val_images": images,
        })  # fmt: skip
        console.print(f"{subject.name}: {index} of {len(first.regions)}, {region.name} {drop:+.3f}")
    return rows


def rescore_by_drops(analysis: Analysis, drops: Iterable[Row]) -> Analysis:
    """Take the mAP lost without each region as its score; gives the analysis of the criterion ``oracle``."""
    truth = {row["region"]: row["mAP_drop"] for row in drops}
    return replace(analysis, regions=tuple(replace(each, score=truth[each.name]) for each in analysis.regions))


if __name__ == "__main__":
    main()
