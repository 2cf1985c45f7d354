"""Sections about what a pruned model still finds and how fast it is, and about what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxprune.planning.plan import Plan
from fxprune.planning.provenance import as_mapping, as_number
from fxprune.reporting.table_model import Column, Row, Section, count_noun, format_milliseconds

NextSteps = tuple[tuple[str, str], ...]
"""What to type next, and what for."""
KEEP_STEPS: NextSteps = (
    ('fxprune.save(pruned, "pruned")', "keep it; fxprune.load reads it back"),
    ('fxprune.draw(pruned, "pruned.html")', "see what went and what stayed"),
)
PLAN_STEPS: NextSteps = (
    ("pruned = fxprune.apply(model, plan)", "remove them"),
    ('pruned = fxprune.heal(pruned, model, calib_loader, "affine")', "mend what is left, without labels"),
    ('fxprune.draw(plan, "plan.html")', "see what would go"),
)
DETECTOR_STEP = ('fxprune.evaluate(pruned, data)["mAP"]', "mAP on labelled images (fxprune.CocoDataset)")
AGREEMENT_STEP = ("print(fxprune.agreement(model, pruned, images))", "what it still finds; needs no labels")
TRAIN_STEP = ('pruned.train(data="data.yaml", epochs=50)', "train on; what was removed stays removed")
TITLES = {
    "held out": "Measured on {} held out: pruning did not use them",
    "given": "Measured on {} given for it",
    "calibration": "Measured on {} that pruning used too",
}
"""Title by the entry ``source`` of the plan's settings."""
NOT_APPLIED = "Nothing is measured yet: this plan was not applied."
NOT_MEASURED = "Nothing was measured after this pruning. fxprune.compile does so, unless measure=False."
USED_NOTE = "There were too few images to hold any out. On others, the pruned model will agree less."
BOXES_NOTE = (
    "Boxes: those that the unpruned model is sure of (score .5, or half its best if that is less). Found again: the"
    " pruned model has one of the same class, with an IoU of .5 and half the score. Their mAP: COCO's, with these as"
    " truth."
)
NOISE_NOTE = "±: 95% interval, or what two timings of the same model differ by, if that is more."


def measured_section(plans: Sequence[Plan], applied: bool) -> Section:
    """Build the table of what was measured after the last pruning; without a measurement, a line says so."""
    note = plans[-1].settings.measured if applied else {}
    if not note:
        return Section("Measured", (), (), (NOT_MEASURED if applied else NOT_APPLIED,))
    rows, notes = [], []
    for name, describe in (("agreement", _agreement_rows), ("quality", _quality_rows), ("latency", _latency_rows)):
        part = as_mapping(note.get(name))
        if "failed" in part:
            notes.append(f"Not measured: {name} ({part['failed']}).")
        elif part:
            rows += list(describe(part))
            notes += list(NOTES[name](part))
    source = str(note.get("source"))
    title = TITLES.get(source, "Measured on {}").format(count_noun(note.get("images", "?"), "image"))
    step = (f"Before: as it was before step {len(plans)}.",) if len(plans) > 1 else ()
    used = (USED_NOTE,) if source == "calibration" else ()
    columns = (Column("", "words"), *(Column(name, "number") for name in ("before", "after", "change")))
    return Section(title, columns if rows else (), tuple(rows), (*step, *used, *notes))


def _agreement_rows(part: Mapping[str, Any]) -> Iterator[Row]:
    share, boxes, images = (as_number(part.get(name)) for name in ("share", "boxes", "images"))
    own = as_number(part.get("mAP"))
    if share is None or images is None:
        return
    whole, name = (images, "images of the same class") if boxes is None else (boxes, "boxes found again")
    yield Row((name, f"{whole:.0f}", f"{share * whole:.0f}", f"{share:.1%} kept"))
    if own is not None:
        yield Row(("their mAP", "1.000", f"{own:.3f}", _difference(own - 1)))


def _quality_rows(part: Mapping[str, Any]) -> Iterator[Row]:
    before, after = as_number(part.get("before")), as_number(part.get("after"))
    if before is not None and after is not None:
        row = (f"{part.get('name')} on labels", f"{before:.3f}", f"{after:.3f}", _difference(after - before))
        yield Row(row)


def _latency_rows(part: Mapping[str, Any]) -> Iterator[Row]:
    before, after = as_number(part.get("before_ms")), as_number(part.get("after_ms"))
    ratio, noise = as_number(part.get("ratio")), _noise(part)
    if before is None or after is None or ratio is None:
        return
    change = f"{_percent(ratio - 1)} ± {noise:.1%}"
    yield Row(("ms per image", format_milliseconds(before), format_milliseconds(after), change))


def _agreement_notes(part: Mapping[str, Any]) -> Iterator[str]:
    if part.get("boxes") is not None:
        yield BOXES_NOTE


def _latency_notes(part: Mapping[str, Any]) -> Iterator[str]:
    images, batch = part.get("images"), part.get("batch")
    fewer = f" (not {batch}, to save time)" if images != batch else ""
    yield (
        f"ms: eager, float32, {part.get('device')}, {count_noun(part.get('threads'), 'thread')},"
        f" {count_noun(images, 'image')} per call{fewer}, median of {part.get('rounds')} rounds in turn. {NOISE_NOTE}"
    )
    ratio = as_number(part.get("ratio"))
    if ratio is not None and abs(ratio - 1) <= _noise(part):
        yield "The change of the ms is within the noise: neither measurably takes less time."


NOTES = {"agreement": _agreement_notes, "quality": lambda part: iter(()), "latency": _latency_notes}


def _noise(part: Mapping[str, Any]) -> float:
    return max(as_number(part.get("error")) or 0.0, as_number(part.get("floor")) or 0.0)


def _difference(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{abs(value):.3f}"


def _percent(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{abs(value):.1%}"


def next_steps(plan: Plan, applied: bool, is_wrapped: bool) -> NextSteps:
    """Return what to type after a pruning, or for a plan. `is_wrapped`: the model is an ultralytics object."""
    if not applied:
        return PLAN_STEPS
    first = [] if plan.settings.measured else [AGREEMENT_STEP]
    first += [DETECTOR_STEP] if "boxes" in plan.settings else []
    return (*first, *KEEP_STEPS, *([TRAIN_STEP] if is_wrapped else []))


def next_section(steps: NextSteps) -> Section:
    """Build the list of what to type next. The words are comments, in Python as in a shell."""
    lines = [line for call, words in steps for line in (f"# {words}", call)]
    return Section("Next", (Column("", "name"),), tuple(Row((line,)) for line in lines))
