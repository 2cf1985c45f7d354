"""Data model of a report: sections, columns and rows; and the formats of its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bar = tuple[float, float]
"""Begin and end of a bar, as fractions of the width."""
Kind = Literal["mark", "name", "words", "number", "bar"]

MAX_NAMES = 6
"""Maximum number of names in one cell."""


@dataclass(frozen=True)
class Column:
    """Heading of a column and kind of its cells; `end_labels` are the labels of the scale of bars."""

    title: str
    kind: Kind
    end_labels: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Row:
    """One row of a table; rows of `removed` regions are highlighted."""

    cells: tuple[str | Bar, ...]
    removed: bool = False


@dataclass(frozen=True)
class Section:
    """A titled table with notes below it.

    Attributes
    ----------
    title : str
    columns : tuple of Column
        Without columns, the section is its notes.
    rows : tuple of Row
        One cell per column; a `Bar` if the kind of the column is ``"bar"``.
    notes : tuple of str
    more : Section or None
        Rows that are too many to show. The title says how many there are and which attribute holds all.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    more: Section | None = None


def format_quantity(value: float) -> str:
    """Format a count with an SI prefix: ``format_quantity(12_300_000) == "12.3M"``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:  # values that round to 1000 have the next prefix
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.0f}"


def format_change(before: float, after: float) -> str:
    """Format a relative change with its sign: ``format_change(200, 180) == "−10.0%"``."""
    share = format_share(abs(before - after), before)
    return f"{'−' if after < before else '+'}{share}" if before != after else share


def format_milliseconds(value: float) -> str:
    """Format a latency with three digits: ``format_milliseconds(57.123) == "57.1"``."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def count_noun(count: object, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def format_share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "?"
