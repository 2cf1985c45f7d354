"""What a report is made of: sections of rows, and numbers in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bar = tuple[float, float]
"""Begin and end as fractions of the width."""
Kind = Literal["mark", "name", "words", "number", "bar"]

MAX_NAMES = 6
"""Names in one cell."""


@dataclass(frozen=True)
class Column:
    """Heading and kind of the cells below it; `end_labels` are the labels of a bar's scale."""

    title: str
    kind: Kind
    end_labels: tuple[str, str] = ("", "")


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


def format_quantity(value: float) -> str:
    """Write a count with an SI prefix: ``format_quantity(12_300_000) == "12.3M"``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:  # what rounds to 1000 of the smaller unit is 1 of this one
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.0f}"


def format_change(before: float, after: float) -> str:
    """Write what became less, or more, as a signed share: ``format_change(200, 180) == "−10.0%"``."""
    share = format_share(abs(before - after), before)
    return f"{'−' if after < before else '+'}{share}" if before != after else share


def format_milliseconds(value: float) -> str:
    """Write a latency with three digits: ``format_milliseconds(57.123) == "57.1"``."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def count_noun(count: object, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def format_share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "?"
