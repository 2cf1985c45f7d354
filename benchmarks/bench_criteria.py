"""Other ways to make one number of gradient and difference: what each keeps of the trained detectors.

    python -m benchmarks.bench_criteria [MODEL ...] [--budgets 0.1 0.2 0.3]

``grad_delta`` sums ``|g_i (y_i - s_i)|`` over all elements i of a region's exit value. Tried beside it, all from the
same forward and backward pass: sums over a channel or over a whole image before the absolute value, the squares of the
elements (the diagonal of the empirical Fisher information), the root mean square over images, the squared score, and
the score times how far the region moves its input. Rows go to ``results/bench_criteria.jsonl``; plans that
`benchmarks.bench_paper` has evaluated already are not evaluated again.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx

import fxprune
from benchmarks.results import RESULTS, machine, read_rows, replace_rows
from benchmarks.subjects import Subject, add_options, subjects
from fxprune.analysis import Analysis
from fxprune.calibration import Calibration, read_batch, take_loss
from fxprune.detectors.choice import choose_adapter
from fxprune.graph import is_weighted, map_tensors
from fxprune.interpreting import interpreted
from fxprune.isolation import private_copy
from fxprune.regions import Region
from fxprune.study import Study

Sums = dict[str, Tensor]
"""Per image, float64 (N,), by name."""

console = Console(stderr=True)


def reduce_terms(gradient: Tensor, activation: Tensor, stand_in: Tensor) -> Sums:
    """Per-image sums of the terms ``g (y - s)`` that the variants are made of; all three of shape (N, C, ...)."""
    difference = activation - stand_in
    terms = (gradient * difference).double()
    flat = terms.flatten(1)
    channels = terms.flatten(2).sum(2) if terms.ndim > 2 else flat
    return {
        "elements": flat.abs().sum(1),
        "squares": flat.square().sum(1),
        "channels": channels.abs().sum(1),
        "image": flat.sum(1),
        "moved": difference.double().flatten(1).square().sum(1),
        "input": stand_in.double().flatten(1).square().sum(1),
    }


VARIANTS: dict[str, Callable[[Sums], float]] = {
    "grad_delta": lambda sums: float(sums["elements"].mean()),
    "grad_delta squared": lambda sums: float(sums["elements"].mean()) ** 2,
    "per channel": lambda sums: float(sums["channels"].mean()),
    "per image": lambda sums: float(sums["image"].abs().mean()),
    "per image, rms": lambda sums: float(sums["image"].square().mean().sqrt()),
    "fisher": lambda sums: float(sums["squares"].mean()),
    "grad_delta x novelty": lambda sums: float(
        sums["elements"].mean() * (sums["moved"].mean() / sums["input"].mean().clamp_min(1e-12)).sqrt()
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Score, plan and evaluate; print the summary."""
    parser = argparse.ArgumentParser(description="What variants of the gradient criterion keep.")
    add_options(parser)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in subjects(options):
        replace_rows("bench_criteria", subject.name, measure(subject, options.budgets))
    (RESULTS / "criteria.md").write_text(table(), encoding="utf-8")
    console.print(table())


def measure(subject: Subject, budgets: Iterable[float]) -> list[dict[str, Any]]:
    """One row per variant and budget."""
    known = {frozenset(row["regions"]): row["mAP"] for row in read_rows("bench_paper") if row["model"] == subject.name}
    whole = known.get(frozenset()) or subject.evaluate(subject.model)["mAP"]
    analysis = fxprune.analyze(subject.model, subject.batches(), criterion="l1")
    sums = collect(subject)
    rows = []
    for variant, make in VARIANTS.items():
        scored = rescored(analysis, {name: make(found) for name, found in sums.items()})
        for budget in budgets:
            plan = scored.plan(budget)
            names = frozenset(region.name for region in plan.removed)
            if names not in known:
                known[names] = subject.evaluate(fxprune.apply(subject.model, plan))["mAP"]
            rows.append({
                "model": subject.name, "variant": variant, "budget": budget, "mAP": known[names],
                "mAP_loss": whole - known[names], "regions": sorted(names), "machine": machine(),
            })  # fmt: skip
            console.print(f"{subject.name}: {variant} at {budget:.0%} loses {whole - known[names]:.3f}")
    return rows


def rescored(analysis: Analysis, scores: Mapping[str, float]) -> Analysis:
    """The same analysis with other scores; regions without one are left out."""
    regions = tuple(replace(region, score=scores[region.name]) for region in analysis.regions if region.name in scores)
    return replace(analysis, regions=regions)


def collect(subject: Subject) -> dict[str, Sums]:
    """Sums of every region over the calibration images, from one forward and backward pass a batch."""
    calibration = Calibration(subject.batches())
    model = private_copy(subject.model)
    adapter = choose_adapter(model, calibration.first_raw, None)
    adapter.prepare(model)
    first, _ = read_batch(model, adapter, calibration.first_raw, 0)
    captured = Study("grad_delta", None, "proved", 0).capture(model, adapter, first)
    everything: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    batch_sums: dict[str, list[Sums]] = defaultdict(list)

    def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
        return TermInterpreter(gm, [region for region in captured.regions if region.island == island], batch_sums)

    with interpreted(captured.graphs, make):
        for index, batch in enumerate(calibration.batches(captured.model, adapter)):
            batch_sums.clear()
            take_loss(captured.model, adapter, batch, index, 0).backward()  # type: ignore[no-untyped-call]
            for name, calls in batch_sums.items():
                for key in calls[0]:
                    everything[name][key].append(over_calls([call[key] for call in calls], batch.count) * batch.count)
    return {name: {key: torch.cat(parts) for key, parts in found.items()} for name, found in everything.items()}


def over_calls(parts: list[Tensor], images: int) -> Tensor:
    """Sum over the calls of an island; where a call is not per image (proposals), its sum is spread evenly."""
    return sum((p if len(p) == images else (p.sum() / images).expand(images) for p in parts), torch.zeros(images))


class TermInterpreter(fx.Interpreter):
    """Runs a graph and reduces ``g (y - s)`` at every region's exit as its gradient comes."""

    def __init__(self, gm: fx.GraphModule, regions: Iterable[Region], sums: dict[str, list[Sums]]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.sums = sums
        self.exits: dict[str, list[Region]] = defaultdict(list)
        for region in regions:
            self.exits[region.exit].append(region)
        self.values = {node.name: node for node in gm.graph.nodes}
        self.weighted = {node.name for node in gm.graph.nodes if is_weighted(gm, node)}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and hook its value if it is an exit."""
        value = super().run_node(n)
        if n.name in self.weighted and torch.is_grad_enabled():
            value = map_tensors(value, lambda t: t if t.requires_grad else t.detach().requires_grad_())
        if isinstance(value, Tensor) and value.requires_grad:
            for region in self.exits.get(n.name, ()):
                self._hook(region.name, value, self.env[self.values[region.stand_in]].detach())
        return value

    def _hook(self, name: str, value: Tensor, stand_in: Tensor) -> None:
        activation = value.detach()

        def hook(gradient: Tensor) -> None:
            self.sums[name].append(reduce_terms(gradient, activation, stand_in))

        value.register_hook(hook)  # type: ignore[no-untyped-call]


def table() -> str:
    """Mean loss of mAP over models, by variant and budget, and over everything."""
    rows = read_rows("bench_criteria")
    budgets = sorted({row["budget"] for row in rows})
    lines = [f"| variant | mean loss | {' | '.join(f'at {budget:.0%}' for budget in budgets)} |"]
    lines.append("|---|" + "--:|" * (len(budgets) + 1))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = [mean(row["mAP_loss"] for row in own)]
        cells += [mean(row["mAP_loss"] for row in own if row["budget"] == budget) for budget in budgets]
        lines.append(f"| {variant} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
