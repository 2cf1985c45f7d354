"""Writes the sections of a report to the terminal and as Markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from fxprune.reporting.table_model import Column, Row, Section

MAX_WIDTH, NARROW_WIDTH = 120, 90
NUMBERS = 23
"""Width in characters of the mark, the score and the costs of a block."""
MARKDOWN_BAR = 24


def render_terminal(sections: Iterable[Section], width: int) -> Iterator[RenderableType]:
    """Draw sections for a rich console.

    Parameters
    ----------
    sections : iterable of Section
    width : int
        Width of the terminal in characters.

    Yields
    ------
    RenderableType

    Examples
    --------
    >>> Console().print(*render_terminal(sections, 80))               # doctest: +SKIP
    """
    width = min(width, MAX_WIDTH)
    for index, section in enumerate(sections):
        yield Text(f"\n{section.title}" if index else section.title, style="bold")
        if section.columns:
            yield _table(section, width)
        for note in _notes(section):
            yield Constrain(Text(note, style="dim"), width)


def render_markdown(sections: Iterable[Section]) -> str:
    """Write sections as Markdown; bars are text.

    Parameters
    ----------
    sections : iterable of Section

    Returns
    -------
    str

    Examples
    --------
    >>> print(render_markdown(sections))                               # doctest: +SKIP
    """
    return "\n\n".join(block for section in sections for block in _blocks(section)) + "\n"


def _notes(section: Section) -> tuple[str, ...]:
    return (*section.notes, *([section.more.title] if section.more else []))


def _table(section: Section, width: int) -> Table:
    titled = any(column.title for column in section.columns)
    gap, least = (2 if width > NARROW_WIDTH else 1), (10 if width >= 60 else 4)
    table = Table(box=None, show_header=titled, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    if any(column.kind == "bar" for column in section.columns):
        table.width = width
    for column in section.columns:
        options: dict[str, Any] = {"overflow": "fold", "no_wrap": column.kind in ("mark", "number")}
        if column.kind == "bar":
            options |= {"min_width": least, "ratio": 1}
        if column.kind == "name" and table.width:
            options |= {"max_width": max(width - NUMBERS - least - 5 * gap, 8)}
        if column.kind == "number":
            options |= {"justify": "right"}
        table.add_column(_scale_line(column.end_labels) if column.kind == "bar" else column.title, **options)
    for row in section.rows:
        color = "red" if row.removed else "cyan"
        cells = [Text(_one_line(cell)) if isinstance(cell, str) else Bar(1.0, *cell, color=color) for cell in row.cells]
        table.add_row(*cells, style="bold red" if row.removed else "")
    return table


def _scale_line(ends: tuple[str, str]) -> Table:
    line = Table.grid(expand=True)
    line.add_column(justify="left")
    line.add_column(justify="right")
    line.add_row(*ends)
    return line


def _blocks(section: Section) -> Iterator[str]:
    heads = [_head(column) for column in section.columns]
    rules = ["--:" if column.kind == "number" else "---" for column in section.columns]
    rows = [_markdown_cells(section.columns, row) for row in section.rows]
    yield f"### {_escape(section.title)}"
    if section.columns:
        yield "\n".join(f"| {' | '.join(line)} |" for line in (heads, rules, *rows))
    yield from map(_escape, _notes(section))


def _head(column: Column) -> str:
    return f"{column.title}, {' to '.join(column.end_labels)}" if column.kind == "bar" else column.title


def _markdown_cells(columns: tuple[Column, ...], row: Row) -> list[str]:
    cells = []
    for column, cell in zip(columns, row.cells, strict=True):
        if not isinstance(cell, str):
            text = _code_span(_bar_text(cell))
        elif column.kind == "name":
            text = _code_span(cell)
        else:
            text = _escape(cell)
        cells.append(f"**{text}**" if row.removed and column.kind == "name" else text)
    return cells


def _bar_text(bar: tuple[float, float]) -> str:
    """Draw a bar in characters, with no-break spaces, so that the bars of negative scores stay in place."""
    console = Console(file=io.StringIO(), width=MARKDOWN_BAR, color_system=None)
    line = "".join(segment.text for segment in console.render(Bar(1.0, *bar))).rstrip()
    return line.replace(" ", "\u00a0")


def _code_span(text: str) -> str:
    """Return a name, with any characters, as a code span; empty if the name is empty."""
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{_one_line(text)}{pad}{fence}".replace("|", "\\|")


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
