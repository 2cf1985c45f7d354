"""The output of the commands: tables, and a curve drawn with characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxprune.planning.plan import Totals
from fxprune.reporting.table_model import format_change, format_milliseconds, format_quantity

CURVE_ROWS = 12


@dataclass(frozen=True)
class Point:
    """One budget of a sweep.

    Attributes
    ----------
    budget : float
        The budget; 0 is the original model.
    cost : Totals or None
        Costs of the pruned model; None if the budget cannot be met.
    removed : tuple of str
        Names of the removed regions.
    scores : mapping
        The output of `fxprune.evaluate`.
    refusal : str
        The reason why the budget cannot be met; empty if it can be met.
    """

    budget: float
    cost: Totals | None
    removed: tuple[str, ...] = ()
    scores: Mapping[str, float] | None = None
    refusal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the point as plain data."""
        return asdict(self) | {"removed": list(self.removed)}


def scores_view(scores: Mapping[str, float], images: int) -> RenderableType:
    """Return a table of average precision, one figure per row."""
    table = _table("", f"on {images} images")
    for name, value in scores.items():
        table.add_row(name, _score(value))
    return table


def sweep_view(points: Sequence[Point], width: int, cost: str, heal: str) -> RenderableType:
    """Return a table with one row per budget, and the curve of mAP over the remaining FLOPs or latency.

    The curve is over latency if `cost` is ``"latency"``.
    """
    timed = points[0].cost is not None and points[0].cost.latency_ms is not None
    table = _table("budget", "mAP", "mAP50", "FLOPs", "params", *(["ms predicted"] if timed else []), "removed")
    table.columns[-1].justify, table.columns[-1].overflow, table.columns[-1].no_wrap = "left", "fold", False
    before = points[0].cost
    assert before is not None
    for point in points:
        budget = f"{point.budget:.0%}" if point.budget else "unpruned"
        if point.cost is None or point.scores is None:
            table.add_row(budget, *[""] * (len(table.columns) - 2), Text(point.refusal, style="yellow"))
            continue
        scores = [_score(point.scores[key]) for key in ("mAP", "mAP50")]
        costs = [_cost(point.cost.flops, before.flops), _cost(point.cost.params, before.params)]
        costs += [_milliseconds(point.cost.latency_ms, before.latency_ms)] if timed else []
        table.add_row(budget, *scores, *costs, ", ".join(point.removed))
    field, what = ("latency_ms", "latency") if cost == "latency" else ("flops", "FLOPs")
    spots = [(getattr(p.cost, field) / getattr(before, field), p.scores["mAP"]) for p in points if p.cost and p.scores]
    healed = [] if heal == "none" else [Text(f"Every pruned model was healed: --heal {heal}.")]
    curve: list[RenderableType] = ["", draw_curve(spots, min(width, 100), what)] if len(spots) > 1 else []
    return Group(table, *healed, *curve)


def draw_curve(spots: Sequence[tuple[float, float]], width: int, what: str = "FLOPs") -> Text:
    """Draw the pairs (remaining share of the cost, mAP) as dots joined by lines; the mAP axis starts at 0.

    Examples
    --------
    >>> print(draw_curve([(1.0, 0.6), (0.8, 0.3)], 40).plain.splitlines()[0].rstrip())
     0.60 ┤                           ··●
    """
    across, top = max(width - 9, 20), max(max(value for _, value in spots), 1e-9)
    least = min(share for share, _ in spots)
    grid = [[" "] * across for _ in range(CURVE_ROWS)]
    places = [
        (round((share - least) / max(1 - least, 1e-9) * (across - 2)), round(value / top * (CURVE_ROWS - 1)))
        for share, value in sorted(spots)
    ]
    for (x0, y0), (x1, y1) in pairwise(places):
        for x in range(x0, x1 + 1):
            grid[round(y0 + (y1 - y0) * (x - x0) / max(x1 - x0, 1))][x] = "·"
    for x, y in places:
        grid[y][x] = "●"
    lines = [
        f"{top * row / (CURVE_ROWS - 1):5.2f} ┤{''.join(grid[row])}"
        if row % (CURVE_ROWS - 1) == 0
        else f"      │{''.join(grid[row])}"
        for row in reversed(range(CURVE_ROWS))
    ]
    left, right = f"{least:.0%} of the {what}", "100%"
    lines += [f"      └{'─' * (across - 1)}", f"  mAP  {left}{right:>{across - 1 - len(left)}}"]
    return Text("\n".join(lines), no_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    return table


def _score(value: float) -> str:
    return f"{value:.3f}" if value == value else "no true box"


def _cost(after: float, before: float) -> str:
    return f"{format_quantity(after)} {format_change(before, after)}" if after != before else format_quantity(after)


def _milliseconds(after: float | None, before: float | None) -> str:
    if after is None or before is None:
        return ""
    return (
        f"{format_milliseconds(after)} {format_change(before, after)}"
        if after != before
        else format_milliseconds(after)
    )
