"""Sections about the history of a pruned model: its steps, its healing and its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from fxprune.planning.plan import Plan, Totals, cost_of
from fxprune.planning.provenance import as_number
from fxprune.reporting.importance_scale import choose_scale
from fxprune.reporting.table_model import (
    MAX_NAMES,
    Column,
    Kind,
    Row,
    Section,
    count_noun,
    format_change,
    format_quantity,
    format_share,
)
from fxprune.runtime.json_text import first_few

COST_NAMES = {"flops": "FLOPs", "latency": "latency", "params": "parameters"}

JUDGEMENT_SETTINGS = ("loss_increase", "agreement")
DESCRIBED_SETTINGS = (
    *("images", "batches", "targets", "boxes", "images_with_boxes", "strategy", "tried", "mended", "heal", "measured"),
    *JUDGEMENT_SETTINGS,
)
"""Settings that the report describes in sentences."""
METHOD_NOTES = {
    "affine": "affine: the layers were fitted, one after the other, to the outputs of the original model.",
    "mimic": "mimic: fitted as by affine, then trained on the features of the original for at most the steps shown.",
    "mimic_labelled": "mimic_labelled: as mimic, and trained on the labels of the images at the same time.",
}
LOSS_NOTE = (
    "loss: its increase on the calibration images. The increase of each part is divided by the part's original size,"
    " then the parts are added. 0: no increase; 1: as if one part had doubled."
)
DEVIATION_NOTE = (
    "Loss: its absolute change on held-out images. The change of each part is divided by the part's original size (a"
    " single part: by at least 1), then the parts are added. 0: no change; 1: as if one part had doubled."
)
LABELLED_NOTE = (
    "Loss of mimic_labelled: its change on held-out images, by their labels, otherwise as above. Below 0: less than the"
    " loss of the original."
)
DISTANCE_NOTE = (
    "Distance: mean of log(1 + e) over features, on one eighth of these images; e is the mean squared error, divided by"
    " the variance. 0: equal to the original; 0.69: the error is as large as the variance."
)


@dataclass(frozen=True)
class Step:
    """One pruning of a model that was pruned several times.

    Attributes
    ----------
    removed : tuple of str
        Names of the removed regions, least important first.
    after : Totals
        Totals after this step; `blocks` counts the remaining blocks of the original model.
    loss_increase : float or None
        Increase of the loss after this step; None if no search measured it.
    """

    removed: tuple[str, ...]
    after: Totals
    loss_increase: float | None


def build_steps(plans: Sequence[Plan]) -> tuple[Step, ...]:
    """Return one step per plan, oldest first, with running totals."""
    steps, blocks = [], plans[0].before.blocks
    for plan in plans:
        blocks -= plan.before.blocks - plan.after.blocks
        names = tuple(region.name for region in sorted(plan.removed, key=lambda region: region.score))
        steps.append(Step(names, replace(plan.after, blocks=blocks), plan.settings.loss_increase))
    return tuple(steps)


def steps_section(plans: Sequence[Plan], after: Totals) -> Section:
    """Build the table of steps: removed regions and total savings; `after` holds the totals after the last step."""
    *steps, last = build_steps(plans)
    steps, before, cost = [*steps, replace(last, after=after)], plans[0].before, plans[-1].cost
    costs = {"flops": "FLOPs", cost: COST_NAMES.get(cost, cost)}
    measured = any(step.loss_increase is not None for step in steps)
    rows = []
    for number, step in enumerate(steps, 1):
        savings = [_format_saving(before, step.after, name) for name in costs]
        loss = [format_signed(step.loss_increase)] if measured else []
        rows.append(Row((str(number), first_few(step.removed, MAX_NAMES), *savings, *loss)))
    heads = [f"{name} so far" for name in costs.values()] + (["loss"] if measured else [])
    columns = (Column("step", "number"), Column("removed", "words"), *(Column(head, "number") for head in heads))
    notes = (*_describe_ways(plans), *([LOSS_NOTE] if measured else []))
    return Section("Step by step", columns, tuple(rows), notes, _removed_section(plans))


def _format_saving(before: Totals, after: Totals, cost: str) -> str:
    first, last = cost_of(before, cost), cost_of(after, cost)
    return "" if first is None or last is None else format_change(first, last)


def _describe_ways(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield the budget, criterion and calibration: one line per run of steps with the same ones."""

    def way(numbered: tuple[int, Plan]) -> str:
        plan = numbered[1]
        return f"{_describe_budget(plan)}; by {plan.settings.criterion}; {_describe_calibration(plan)}"

    for text, group in groupby(enumerate(plans, 1), way):
        numbers = [number for number, _ in group]
        yield f"{numbers[0]}{f' to {numbers[-1]}' if len(numbers) > 1 else ''}: {text}"


def _removed_section(plans: Sequence[Plan]) -> Section:
    titles = ("step", "block", "criterion", "score", "FLOPs", "params")
    kinds: tuple[Kind, ...] = ("number", "name", "words", "number", "number", "number")
    rows = []
    for number, plan in enumerate(plans, 1):
        scale, criterion = choose_scale(region.score for region in plan.regions), plan.settings.criterion
        for region in sorted(plan.removed, key=lambda region: region.score):
            costs = format_share(region.flops, plans[0].before.flops), format_quantity(region.params)
            rows.append(
                Row((str(number), region.name, criterion, scale.format_score(region.score), *costs), removed=True)
            )
    columns = tuple(Column(title, kind) for title, kind in zip(titles, kinds, strict=True))
    return Section(f"Each of the {len(rows)} with its score: report.regions", columns, tuple(rows))


def healing_section(plans: Sequence[Plan]) -> Section | None:
    """Build the table of healings, with feature distances before and after; None if the model was not healed."""
    known = [plan.settings.healing for plan in plans if plan.settings.healing]
    if not known:
        return None
    trained, judged = (any(key in note for note in known) for key in ("steps", "loss"))
    titles = ["images", *(["steps"] if trained else []), "distance before", "after", "change"]
    titles += ["loss before", "after"] if judged else []
    columns = (Column("method", "words"), *(Column(title, "number") for title in titles))
    rows = tuple(_healing_row(note, trained, judged) for note in known)
    methods = dict.fromkeys(note.get("method") for note in known)
    words = [METHOD_NOTES[name] for name in methods if name in METHOD_NOTES]
    losses = [DEVIATION_NOTE] * judged + [LABELLED_NOTE] * any(note.get("labels") for note in known)
    notes = (*words, *filter(None, map(_describe_share, known)), DISTANCE_NOTE, *losses)
    return Section("Healed", columns, rows, notes)


def _describe_share(note: Mapping[str, Any]) -> str:
    """Return a sentence on the share of the weight change that was applied; empty if it was all of it."""
    share = as_number(note.get("share"))
    if share is None or share == 1:
        return ""
    best = (
        "has the least loss on held-out images" if note.get("labels") else "changes the loss on held-out images least"
    )
    return f"{share:.0%} of the weight change was applied: this share {best}."


def _healing_row(note: Mapping[str, Any], trained: bool, judged: bool) -> Row:
    first, last = _before_and_after(note, "distance")
    ends = (
        ("?", "?", "") if first is None or last is None else (f"{first:.3g}", f"{last:.3g}", format_change(first, last))
    )
    steps = [str(note.get("steps", ""))] if trained else []
    losses = ["?" if loss is None else f"{loss:.2g}" for loss in _before_and_after(note, "loss")] if judged else []
    return Row((str(note.get("method")), str(note.get("images", "?")), *steps, *ends, *losses))


def _before_and_after(note: Mapping[str, Any], what: str) -> tuple[float | None, float | None]:
    """Return a quantity before and after a healing; None where it is not known."""
    found = note.get(what)
    known = found if isinstance(found, Mapping) else {}
    return as_number(known.get("before")), as_number(known.get("after"))


def decision_section(plans: Sequence[Plan]) -> Section:
    """Build the table of the settings of the last plan."""
    plan = plans[-1]
    settings = {key: value for key, value in plan.settings.items() if key not in DESCRIBED_SETTINGS}
    settings.pop("versions", None)
    versions = plan.settings.versions
    rows = {
        "budget": _describe_budget(plan),
        "criterion": settings.pop("criterion", ""),
        "calibration": _describe_calibration(plan),
    }
    if "strategy" in plan.settings:
        rows["strategy"] = _describe_strategy(plan)
    if plan.settings.latency:
        settings["latency"] = _describe_latency(plan)
    rows |= settings
    if versions:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    columns = (Column("", "words"), Column("", "words"))
    return Section("How it was decided", columns, tuple(Row((key, str(value))) for key, value in rows.items()))


def _describe_strategy(plan: Plan) -> str:
    name, tried = plan.settings["strategy"], plan.settings.get("tried")
    healed = " after healing" if plan.settings.get("mended", "none") != "none" else ""
    agreement = plan.settings.agreement
    if name == "search" and agreement is not None:
        judged = f"its mAP{healed}, with the boxes of the original model as truth; mAP of the best: {agreement:.3f}"
        return f"search: {count_noun(tried, 'plan')} tried, each judged by {judged}"
    if name == "search":
        judged = f"its loss{healed}; increase of the best: {format_signed(plan.settings.loss_increase)}"
        return f"search: {count_noun(tried, 'plan')} tried, each judged by {judged}"
    return str(name)


def _describe_budget(plan: Plan) -> str:
    """Return the budget in words, with the share that the plan removes."""
    before, after = cost_of(plan.before, plan.cost), cost_of(plan.after, plan.cost)
    cost = COST_NAMES.get(plan.cost, plan.cost)
    removed = f", {format_share(before - after, before)} removed" if before is not None and after is not None else ""
    return f"at least {100 * plan.budget:.3g}% of the {cost}{removed}"


def _describe_calibration(plan: Plan) -> str:
    images, batches, targets = (plan.settings.get(key, "?") for key in ("images", "batches", "targets"))
    boxes, filled = plan.settings.get("boxes"), plan.settings.get("images_with_boxes")
    found = "" if boxes is None else f" ({count_noun(boxes, 'box', 'boxes')} in {filled} of {images} images)"
    return f"{count_noun(images, 'image')} in {count_noun(batches, 'batch', 'batches')}; targets: {targets}{found}"


def latency_conditions(plan: Plan) -> dict[str, Any]:
    """Return the conditions of the plan's latencies. Only latencies with equal conditions can be compared."""
    return {key: plan.settings.latency.get(key, "?") for key in ("backend", "device", "images", "threads")}


def _describe_latency(plan: Plan) -> str:
    backend, device, images, threads = latency_conditions(plan).values()
    floor = plan.settings.latency_floor
    noise = f"; repeated timings of the model differ by {floor:.1%}" if floor else ""
    return f"{backend} on {device}, {count_noun(threads, 'thread')}, {count_noun(images, 'image')} per call{noise}"


def format_signed(value: float | None) -> str:
    """Format an increase with its sign: ``format_signed(-0.0123) == "−0.0123"``."""
    return "" if value is None else f"{'−' if value < 0 else '+'}{abs(value):.3g}"
