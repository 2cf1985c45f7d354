"""Variants of the gradient criteria, and the mAP that each loses on the trained detectors.

    python -m benchmarks.bench_criteria [MODEL ...] [--budgets 0.1 0.2 0.3]

Let y be the value at a region's exit, s the value that stands in for it after the removal, and g the gradient of the
loss by y. ``grad_delta`` sums ``|g_i (y_i - s_i)|`` over all elements i. The variants come from one forward and
backward pass:

- sums over a channel or over a whole image before the absolute value is taken;
- squares instead of absolute values;
- a loss whose parts are divided by their own size (`fxprune.attribution.criteria.relative_loss`);
- gates: the gradient is taken at ``s + gate (y - s)``.

``fisher`` sums squares over channels and squares the sum, with the relative loss and gates of .9. Rows go to
``results/bench_criteria.jsonl``, the table to ``results/criteria.md``. Plans that `benchmarks.bench_paper` has
evaluated are not evaluated again.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx

import fxprune
from benchmarks.results import RESULTS, describe_machine, read_rows, replace_rows
from benchmarks.subjects import Subject, add_options, load_subjects
from fxprune.attribution.captured_model import find_all_regions
from fxprune.attribution.criteria import FISHER_GATE, relative_loss
from fxprune.datasets.calibration import open_calibration
from fxprune.graph.fx_utils import is_weighted, map_tensors
from fxprune.graph.interpreters import run_with
from fxprune.graph.records import Region
from fxprune.planning.analysis import Analysis

Sums = dict[str, Tensor]
"""Sums by name, one value per image, float64 (N,)."""

console = Console(stderr=True)


def reduce_terms(gradient: Tensor, activation: Tensor, stand_in: Tensor) -> Sums:
    """Sum the terms ``g (y - s)`` per image in the ways of the variants; all tensors have shape (N, C, ...)."""
    terms = (gradient * (activation - stand_in)).double()
    flat = terms.flatten(1)
    channels = terms.flatten(2).sum(2) if terms.ndim > 2 else flat
    return {
        "elements": flat.abs().sum(1),
        "squares": flat.square().sum(1),
        "channels": channels.abs().sum(1),
        "channel squares": channels.square().sum(1),
        "image": flat.sum(1),
    }


@dataclass(frozen=True)
class Pass:
    """How gradients are taken.

    Attributes
    ----------
    loss : callable
        Makes one number of the parts of the loss.
    gate : float
        1 keeps the region's value, 0 replaces it by what stands in for it.
    """

    loss: Callable[[Tensor], Tensor]
    gate: float = 1.0


PLAIN, RELATIVE = Pass(torch.sum), Pass(relative_loss)


def make_mean(key: str) -> Callable[[Sums], float]:
    """Make the criterion that is the mean over images of the sum `key` of `reduce_terms`."""
    return lambda sums: float(sums[key].abs().mean())


def mean_image_squares(sums: Sums) -> float:
    """Average the squared sum over all elements: the Fisher information of one gate per region."""
    return float(sums["image"].square().mean())


def squared_fisher(sums: Sums) -> float:
    """Square the Fisher information of gates on channels, as `fxprune.attribution.criteria` does."""
    return float(sums["channel squares"].mean()) ** 2


VARIANTS: dict[str, tuple[Pass, Callable[[Sums], float]]] = {
    "grad_delta": (PLAIN, make_mean("elements")),
    "grad_delta squared": (PLAIN, lambda sums: float(sums["elements"].mean()) ** 2),
    "per channel": (PLAIN, make_mean("channels")),
    "per image": (PLAIN, make_mean("image")),
    "squares of elements": (PLAIN, make_mean("squares")),
    "squares of images": (PLAIN, mean_image_squares),
    "grad_delta, relative": (RELATIVE, make_mean("elements")),
    "per image, relative": (RELATIVE, make_mean("image")),
    "squares of elements, relative": (RELATIVE, make_mean("squares")),
    "squares of channels, relative": (RELATIVE, make_mean("channel squares")),
    "squares of images, relative": (RELATIVE, mean_image_squares),
    "squares of images, gates of .8": (Pass(relative_loss, 0.8), mean_image_squares),
    "squares of channels, gates of .9": (Pass(relative_loss, FISHER_GATE), make_mean("channel squares")),
    "fisher without gates": (RELATIVE, squared_fisher),
    "fisher": (Pass(relative_loss, FISHER_GATE), squared_fisher),
    "fisher, gates of .8": (Pass(relative_loss, 0.8), squared_fisher),
}


def main(argv: list[str] | None = None) -> None:
    """Score, plan and evaluate; write and print the table."""
    parser = argparse.ArgumentParser(description="What variants of the gradient criterion keep.")
    add_options(parser)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for subject in load_subjects(options):
        replace_rows("bench_criteria", subject.name, measure(subject, options.budgets))
    (RESULTS / "criteria.md").write_text(render_table(), encoding="utf-8")
    console.print(render_table())


def measure(subject: Subject, budgets: Iterable[float]) -> list[dict[str, Any]]:
    """Measure one row per variant and budget."""
    known = {frozenset(row["regions"]): row["mAP"] for row in read_rows("bench_paper") if row["model"] == subject.name}
    whole = known.get(frozenset()) or subject.evaluate(subject.model)["mAP"]
    analysis = fxprune.analyze(subject.model, subject.batches(), criterion="l1")
    captured = CapturedDetector(subject)
    sums = {taken: captured.collect(taken) for taken in {taken for taken, _ in VARIANTS.values()}}
    rows = []
    for variant, (taken, make) in VARIANTS.items():
        scored = replace_scores(analysis, {name: make(found) for name, found in sums[taken].items()})
        for budget in budgets:
            plan = scored.plan(budget)
            names = frozenset(region.name for region in plan.removed)
            if names not in known:
                known[names] = subject.evaluate(fxprune.apply(subject.model, plan))["mAP"]
            rows.append({
                "model": subject.name, "variant": variant, "budget": budget, "mAP": known[names],
                "mAP_loss": whole - known[names], "regions": sorted(names),
                "machine": describe_machine(str(subject.device)),
            })  # fmt: skip
            console.print(f"{subject.name}: {variant} at {budget:.0%} loses {whole - known[names]:.3f}")
    return rows


def replace_scores(analysis: Analysis, scores: Mapping[str, float]) -> Analysis:
    """Replace the scores of an analysis; regions without a new score are left out."""
    regions = tuple(replace(region, score=scores[region.name]) for region in analysis.regions if region.name in scores)
    return replace(analysis, regions=regions)


class CapturedDetector:
    """A detector's captured graphs and its calibration batches."""

    def __init__(self, subject: Subject) -> None:
        opened = open_calibration(subject.model, subject.batches(), None)
        self.batches = opened.keep().batches
        self.captured = find_all_regions(opened.adapted, self.batches[0])

    def collect(self, taken: Pass) -> dict[str, Sums]:
        """Collect the sums of every region over the calibration images; one forward and backward pass per batch."""
        everything: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        batch_sums: dict[str, list[Sums]] = defaultdict(list)

        def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
            regions = [region for region in self.captured.regions if region.island == island]
            return TermInterpreter(gm, regions, batch_sums, taken.gate)

        with run_with(self.captured.graphs, make):
            for index, batch in enumerate(self.batches):
                batch_sums.clear()
                parts = self.captured.adapted.loss(index, batch)
                taken.loss(parts).backward()  # type: ignore[no-untyped-call]
                for name, calls in batch_sums.items():
                    for key in calls[0]:
                        sums = sum_over_calls([call[key] for call in calls], batch.count)
                        power = 2 if "squares" in key else 1  # the loss is a mean over the images
                        everything[name][key].append(sums * batch.count**power)
        return {name: {key: torch.cat(parts) for key, parts in found.items()} for name, found in everything.items()}


def sum_over_calls(parts: list[Tensor], images: int) -> Tensor:
    """Sum over the calls of an island, per image.

    If the rows of a call cannot be assigned to images, their sum is divided evenly.
    """
    total = torch.zeros(images, dtype=torch.float64)
    for part in parts:
        total = total + (part.reshape(images, -1).sum(1) if len(part) % images == 0 else part.sum() / images)
    return total


class TermInterpreter(fx.Interpreter):
    """Runs a graph with gated regions and reduces ``g (y - s)`` at every exit in the backward pass."""

    def __init__(self, gm: fx.GraphModule, regions: Iterable[Region], sums: dict[str, list[Sums]], gate: float) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.sums, self.gate = sums, gate
        self.regions_by_exit: dict[str, list[Region]] = defaultdict(list)
        for region in regions:
            self.regions_by_exit[region.exit].append(region)
        self.values = {node.name: node for node in gm.graph.nodes}
        self.weighted = {node.name for node in gm.graph.nodes if is_weighted(gm, node)}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; if it is an exit, add a hook to its value."""
        value = super().run_node(n)
        if n.name in self.weighted and torch.is_grad_enabled():
            value = map_tensors(value, lambda t: t if t.requires_grad else t.detach().requires_grad_())
        regions = self.regions_by_exit.get(n.name, ())
        if not regions or not isinstance(value, Tensor) or not value.requires_grad:
            return value
        stand_ins = {region: self.env[self.values[region.stand_in]] for region in regions}
        activation = value.detach()
        if self.gate != 1.0:
            value = torch.lerp(stand_ins[max(regions, key=lambda region: len(region.nodes))], value, self.gate)
        for region, stand_in in stand_ins.items():
            self._hook(region.name, value, activation, stand_in.detach())
        return value

    def _hook(self, name: str, value: Tensor, activation: Tensor, stand_in: Tensor) -> None:
        def hook(gradient: Tensor) -> None:
            self.sums[name].append(reduce_terms(gradient, activation, stand_in))

        value.register_hook(hook)  # type: ignore[no-untyped-call]


def render_table() -> str:
    """Render the mean loss of mAP over models, by variant and budget."""
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
