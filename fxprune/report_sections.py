"""What a report says, as sections of rows: the terminal, Markdown and HTML draw these and say nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fxprune.analysis import conflicts
from fxprune.plan import Candidate, Plan, Totals
from fxprune.regions import Rejection
from fxprune.report_scale import Scale, scale_of

Bar = tuple[float, float]
"""Begin and end as fractions of the width."""
Kind = Literal["mark", "name", "words", "number", "bar"]

MOST = 40
"""Blocks in a chart, unless more than these were removed."""
MOST_NAMES = 6
"""Names in one cell."""
REMOVED, RIVAL = "✂", "~"

COST_NAMES = {"flops": "FLOPs", "latency": "latency", "params": "parameters"}
FIELDS = {"latency": "latency_ms"}
"""Fields of `Totals` and `Candidate` that hold a cost, if not named as it is."""

# What differs between two reasons of one kind.
DETAILS = {
    r"^it turns \S+ into \S+,": "it changes the shape,",
    r"^it could become '.*', but what lies between is also read by .*": (
        "it could become an earlier value, but what lies between is also read elsewhere"
    ),
}


@dataclass(frozen=True)
class Column:
    """Heading and kind of the cells below it; `ends` are the labels of a bar's scale."""

    title: str
    kind: Kind
    ends: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Row:
    """One line of a table; `removed` ones stand out."""

    cells: tuple[str | Bar, ...]
    removed: bool = False


@dataclass(frozen=True)
class Section:
    """A titled table with notes below it.

    Attributes
    ----------
    title : str
    columns : tuple of Column
    rows : tuple of Row
        A cell for each column; a `Bar` where the column is one.
    notes : tuple of str
    more : Section or None
        What is too long for a page. Its title says how much that is, and where all of it is.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    more: Section | None = None


def describe(plans: Sequence[Plan], applied: bool, before: Totals, after: Totals) -> tuple[Section, ...]:
    """Say everything of one or more prunings.

    Parameters
    ----------
    plans : sequence of Plan
        Oldest first.
    applied : bool
        Whether they were carried out.
    before, after : Totals
        The model before the first, and after the last.

    Returns
    -------
    tuple of Section

    Examples
    --------
    >>> [section.title for section in describe([plan], False, plan.before, plan.after)]  # doctest: +SKIP
    """
    last, earlier = plans[-1], plans[:-1]
    gone = sum(len(plan.removed) for plan in plans)
    candidates = len(last.regions) + gone - len(last.removed)
    title = f"{'fxprune removed' if applied else 'This plan removes'} {gone} of {candidates} candidates"
    sections = [_costs(title, before, after, plans), _chart(last, before)]
    if earlier:
        sections.append(_earlier(earlier, before))
    if last.rejections:
        sections.append(_refused(last.rejections))
    return (*sections, _making(last))


def quantity(value: float) -> str:
    """Write a count with an SI prefix: ``quantity(12_300_000) == "12.3M"``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:  # what rounds to 1000 of the smaller unit is 1 of this one
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.0f}"


def change(before: float, after: float) -> str:
    """Write what became less, or more, as a signed share: ``change(200, 180) == "−10.0%"``."""
    share = _share(abs(before - after), before)
    return f"{'−' if after < before else '+'}{share}" if before != after else share


def milliseconds(value: float) -> str:
    """Write a latency with three digits: ``milliseconds(57.123) == "57.1"``."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _costs(title: str, before: Totals, after: Totals, plans: Sequence[Plan]) -> Section:
    columns = (Column("", "words"), *(Column(name, "number") for name in ("before", "after", "change")))
    rows = [
        ("FLOPs per image", quantity(before.flops), quantity(after.flops), change(before.flops, after.flops)),
        ("parameters", quantity(before.params), quantity(after.params), change(before.params, after.params)),
        ("blocks", str(before.blocks), str(after.blocks), f"{after.blocks - before.blocks:d}".replace("-", "−")),
    ]
    first, last = before.latency_ms, after.latency_ms
    if first is not None and last is not None and len({repr(_timed_on(plan)) for plan in plans}) == 1:
        name = f"latency (ms, {_timed_on(plans[-1]).get('backend')}, predicted)"
        rows.append((name, milliseconds(first), milliseconds(last), change(first, last)))
    return Section(title, columns, tuple(Row(cells) for cells in rows))


def _chart(plan: Plan, whole: Totals) -> Section:
    scale = scale_of(region.score for region in plan.regions)
    columns: tuple[Column, ...] = (
        Column("", "mark"),
        Column("block", "name"),
        Column("importance", "bar", scale.ends),
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
    blocks, room = 0, MOST - len(plan.removed)
    for index in sorted(range(len(marks)), key=lambda index: plan.regions[index].score):
        region = plan.regions[index]
        fits = region.block and not region.removed and room > 0
        room -= fits
        rows = shown if fits or region.removed else hidden
        blocks += region.block and rows is hidden
        rows.append(_row(region, marks[index], scale, whole, timed))
    title = f"Importance by {plan.settings.get('criterion')}, least first"
    more = _hidden(columns, hidden, blocks, len(marks))
    return Section(title, columns, tuple(shown), tuple(_legend(scale, shown)), more)


def _marks(regions: tuple[Candidate, ...]) -> list[str]:
    """Mark what goes, and what cannot go with it."""
    gone = {index for index, region in enumerate(regions) if region.removed}
    rivals = {index for some in conflicts(regions) if some & gone for index in some}
    return [REMOVED if index in gone else RIVAL if index in rivals else "" for index in range(len(regions))]


def _row(region: Candidate, mark: str, scale: Scale, whole: Totals, timed: bool = False) -> Row:
    name = f"{region.name} (drop)" if region.kind == "drop" else region.name
    share, params = _share(region.flops, whole.flops), quantity(region.params)
    latency = (milliseconds(region.latency_ms or 0.0),) if timed else ()
    score = scale.write(region.score)
    return Row((mark, name, scale.bar(region.score), score, share, params, *latency), region.removed)


def _legend(scale: Scale, rows: Sequence[Row]) -> Iterator[str]:
    yield f"{REMOVED} goes: of all choices that meet the budget, the one with the least summed importance."
    if any(row.cells[0] == RIVAL for row in rows):
        yield f"{RIVAL} overlaps with one that goes; only one of them can."
    if any(str(row.cells[1]).endswith(" (drop)") for row in rows):
        yield "(drop): the sum that it feeds keeps the other operand."
    yield scale.words


def _hidden(columns: tuple[Column, ...], rows: Sequence[Row], blocks: int, every: int) -> Section | None:
    inside = len(rows) - blocks
    parts = [f"{_counted(inside, 'candidate')} inside of blocks"] if inside else []
    parts += [_counted(blocks, "more important block")] if blocks else []
    if not parts:
        return None
    return Section(f"Not shown: {' and '.join(parts)}. All {every}: report.regions", columns, tuple(rows))


def _earlier(plans: Sequence[Plan], whole: Totals) -> Section:
    titles = ("pruning", "block", "criterion", "score", "FLOPs", "params")
    kinds: tuple[Kind, ...] = ("number", "name", "words", "number", "number", "number")
    rows = []
    for number, plan in enumerate(plans, 1):
        scale = scale_of(region.score for region in plan.regions)
        for region in sorted(plan.removed, key=lambda region: region.score):
            _, name, _, *costs = _row(region, "", scale, whole).cells
            rows.append(Row((str(number), name, str(plan.settings.get("criterion")), *costs), removed=True))
    notes = tuple(f"{number}: {_asked(plan)}; {_calibration(plan)}" for number, plan in enumerate(plans, 1))
    columns = tuple(Column(title, kind) for title, kind in zip(titles, kinds, strict=True))
    return Section("Removed before, by earlier prunings", columns, tuple(rows), notes)


def _refused(rejections: Sequence[Rejection]) -> Section:
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        groups.setdefault(_kind_of(rejection.reason), []).append(rejection)
    rows = [
        Row((str(len(some)), kind if len(some) > 1 else some[0].reason, _listed([one.name for one in some])))
        for kind, some in groups.items()
    ]
    columns = (Column("", "number"), Column("why", "words"), Column("layers", "words"))
    each = Section(
        f"Each of the {len(rejections)} with its reason: report.rejections",
        (Column("layer", "name"), Column("why", "words")),
        tuple(Row((rejection.name, rejection.reason)) for rejection in rejections),
    )
    return Section("Cannot go", columns, tuple(rows), more=each if len(groups) < len(rejections) else None)


def _making(plan: Plan) -> Section:
    settings = dict(plan.settings)
    versions = settings.pop("versions", {})
    rows = {"budget": _asked(plan), "criterion": settings.pop("criterion", ""), "calibration": _calibration(plan)}
    for key in ("images", "batches", "targets"):
        settings.pop(key, None)
    if isinstance(settings.get("latency"), Mapping):
        settings["latency"] = _timing(plan)
    rows |= settings
    if isinstance(versions, Mapping) and versions:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    columns = (Column("", "words"), Column("", "words"))
    return Section("How it was decided", columns, tuple(Row((key, str(value))) for key, value in rows.items()))


def _asked(plan: Plan) -> str:
    """Say what was asked for, and what came of it."""
    field = FIELDS.get(plan.cost, plan.cost)
    before, after = getattr(plan.before, field, None), getattr(plan.after, field, None)
    what = COST_NAMES.get(plan.cost, plan.cost)
    got = f", {_share(before - after, before)} went" if before is not None and after is not None else ""
    return f"at least {100 * plan.budget:.3g}% of the {what}{got}"


def _calibration(plan: Plan) -> str:
    images, batches, targets = (plan.settings.get(key, "?") for key in ("images", "batches", "targets"))
    return f"{_counted(images, 'image')} in {_counted(batches, 'batch', 'batches')}; targets: {targets}"


def _timed_on(plan: Plan) -> dict[str, Any]:
    """What the plan's milliseconds are of; figures that differ in it do not compare."""
    settings = plan.settings.get("latency")
    known = settings if isinstance(settings, Mapping) else {}
    return {key: known.get(key, "?") for key in ("backend", "device", "images", "threads")}


def _timing(plan: Plan) -> str:
    backend, device, images, threads = _timed_on(plan).values()
    floor = plan.settings["latency"].get("floor")
    noise = f"; the model strays from itself by {floor:.1%}" if isinstance(floor, float) else ""
    return f"{backend} on {device}, {_counted(threads, 'thread')}, {_counted(images, 'image')} a call{noise}"


def _counted(count: object, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _kind_of(reason: str) -> str:
    for pattern, kind in DETAILS.items():
        reason = re.sub(pattern, kind, reason)
    return reason


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "?"
