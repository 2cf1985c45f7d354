"""Builds the sections of a report. The terminal, Markdown and HTML show the same sections."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fxprune.graph.records import Rejection
from fxprune.planning.analysis import exclusive_sets
from fxprune.planning.plan import Candidate, Plan, Totals
from fxprune.reporting.history_tables import decision_section, healing_section, latency_conditions, steps_section
from fxprune.reporting.importance_scale import Scale, choose_scale
from fxprune.reporting.measurement_tables import measured_section
from fxprune.reporting.table_model import (
    MAX_NAMES,
    Column,
    Row,
    Section,
    count_noun,
    format_change,
    format_milliseconds,
    format_quantity,
    format_share,
)
from fxprune.runtime.json_text import first_few

MAX_BLOCKS = 40
"""Number of blocks in a chart; more if more were removed."""
REMOVED_MARK, RIVAL_MARK = "✂", "~"

# Patterns of reasons that differ only in names and shapes, with the text for the whole group.
REASON_PATTERNS = {
    r"^it turns \S+ into \S+,": "it changes the shape,",
    r"^'.*' could be its stand-in, but values between them are also read by .*": (
        "an earlier value could be its stand-in, but values between them are also read elsewhere"
    ),
}


def build_sections(plans: Sequence[Plan], applied: bool, before: Totals, after: Totals) -> tuple[Section, ...]:
    """Build all sections about one or more prunings.

    Parameters
    ----------
    plans : sequence of Plan
        Oldest first.
    applied : bool
        Whether the plans were applied.
    before, after : Totals
        Totals before the first plan and after the last.

    Returns
    -------
    tuple of Section

    Examples
    --------
    >>> [section.title for section in build_sections([plan], False, plan.before, plan.after)]  # doctest: +SKIP
    """
    last = plans[-1]
    gone = sum(len(plan.removed) for plan in plans)
    candidates = len(last.regions) + gone - len(last.removed)
    title = f"{'fxprune removed' if applied else 'This plan removes'} {gone} of {candidates} candidates"
    steps = f" in {len(plans)} steps" if len(plans) > 1 else ""
    sections = (
        _costs(title + steps, before, after, plans),
        steps_section(plans, after) if len(plans) > 1 else None,
        healing_section(plans) if applied else None,
        _chart(last, before, f" before step {len(plans)}" if len(plans) > 1 else ""),
        _rejections_section(last.rejections) if last.rejections else None,
        decision_section(plans),
        measured_section(plans, applied),
    )
    return tuple(section for section in sections if section)


def _costs(title: str, before: Totals, after: Totals, plans: Sequence[Plan]) -> Section:
    columns = (Column("", "words"), *(Column(name, "number") for name in ("before", "after", "change")))
    rows = [
        (
            "FLOPs per image",
            format_quantity(before.flops),
            format_quantity(after.flops),
            format_change(before.flops, after.flops),
        ),
        (
            "parameters",
            format_quantity(before.params),
            format_quantity(after.params),
            format_change(before.params, after.params),
        ),
        ("blocks", str(before.blocks), str(after.blocks), f"{after.blocks - before.blocks:d}".replace("-", "−")),
    ]
    first, last = before.latency_ms, after.latency_ms
    if first is not None and last is not None and len({repr(latency_conditions(plan)) for plan in plans}) == 1:
        name = f"latency (ms, {latency_conditions(plans[-1]).get('backend')}, predicted)"
        rows.append((name, format_milliseconds(first), format_milliseconds(last), format_change(first, last)))
    return Section(title, columns, tuple(Row(cells) for cells in rows))


def _chart(plan: Plan, whole: Totals, when: str) -> Section:
    scale = choose_scale(region.score for region in plan.regions)
    columns: tuple[Column, ...] = (
        Column("", "mark"),
        Column("block", "name"),
        Column("importance", "bar", scale.end_labels),
        Column("score", "number"),
        Column("FLOPs", "number"),
        Column("params", "number"),
    )
    timed = any(region.latency_ms is not None for region in plan.regions)
    if timed:
        columns = (*columns, Column("ms", "number"))
    marks = _marks(plan.regions)
    shown: list[Row] = []
    hidden: list[Row] = []
    blocks, room = 0, MAX_BLOCKS - len(plan.removed)
    for index in sorted(range(len(marks)), key=lambda index: plan.regions[index].score):
        region = plan.regions[index]
        fits = region.block and not region.removed and room > 0
        room -= fits
        rows = shown if fits or region.removed else hidden
        blocks += region.block and rows is hidden
        rows.append(_row(region, marks[index], scale, whole, timed))
    title = f"Importance by {plan.settings.criterion}{when}, least first"
    more = _hidden_section(columns, hidden, blocks, len(marks))
    return Section(title, columns, tuple(shown), tuple(_legend(plan, scale, shown)), more)


def _marks(regions: tuple[Candidate, ...]) -> list[str]:
    """Return a mark per region: removed, overlapping with a removed one, or none."""
    gone = {index for index, region in enumerate(regions) if region.removed}
    rivals = {index for some in exclusive_sets(regions) if some & gone for index in some}
    return [REMOVED_MARK if index in gone else RIVAL_MARK if index in rivals else "" for index in range(len(regions))]


def _row(region: Candidate, mark: str, scale: Scale, whole: Totals, timed: bool = False) -> Row:
    name = f"{region.name} (drop)" if region.kind == "drop" else region.name
    share, params = format_share(region.flops, whole.flops), format_quantity(region.params)
    latency = (format_milliseconds(region.latency_ms or 0.0),) if timed else ()
    score = scale.format_score(region.score)
    return Row((mark, name, scale.bar(region.score), score, share, params, *latency), region.removed)


def _legend(plan: Plan, scale: Scale, rows: Sequence[Row]) -> Iterator[str]:
    choice = "of all choices that meet the budget, this one has the least summed importance."
    tried = plan.settings.get("tried", 1)
    if tried != 1:
        best = "increases the loss least"
        if "agreement" in plan.settings:
            best = "has the highest mAP, with the boxes of the original model as truth"
        choice = f"of {tried} plans that meet the budget, proposed by importance, this one {best}."
    yield f"{REMOVED_MARK} is removed: {choice}"
    if any(row.cells[0] == RIVAL_MARK for row in rows):
        yield f"{RIVAL_MARK} overlaps with a removed one; only one of them can be removed."
    if any(str(row.cells[1]).endswith(" (drop)") for row in rows):
        yield "(drop): one operand of an addition; readers of the sum read the other operand."
    yield scale.description


def _hidden_section(columns: tuple[Column, ...], rows: Sequence[Row], blocks: int, every: int) -> Section | None:
    inside = len(rows) - blocks
    parts = [f"{count_noun(inside, 'candidate')} inside blocks"] if inside else []
    parts += [count_noun(blocks, "more important block")] if blocks else []
    if not parts:
        return None
    return Section(f"Not shown: {' and '.join(parts)}. All {every}: report.regions", columns, tuple(rows))


def _rejections_section(rejections: Sequence[Rejection]) -> Section:
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        groups.setdefault(_kind_of(rejection.reason), []).append(rejection)
    rows = [
        Row(
            (
                str(len(some)),
                kind if len(some) > 1 else some[0].reason,
                first_few([one.name for one in some], MAX_NAMES),
            )
        )
        for kind, some in groups.items()
    ]
    columns = (Column("", "number"), Column("reason", "words"), Column("layers", "words"))
    each = Section(
        f"Each of the {len(rejections)} with its reason: report.rejections",
        (Column("layer", "name"), Column("reason", "words")),
        tuple(Row((rejection.name, rejection.reason)) for rejection in rejections),
    )
    return Section("Cannot be removed", columns, tuple(rows), more=each if len(groups) < len(rejections) else None)


def _kind_of(reason: str) -> str:
    for pattern, kind in REASON_PATTERNS.items():
        reason = re.sub(pattern, kind, reason)
    return reason
