"""Writes the sections of a report as one HTML element with inline styles. Text has the colours of the page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fxprune.reporting.table_model import Bar, Column, Row, Section

KEPT_COLOR, REMOVED_COLOR, TRACK_COLOR, LINE_COLOR = (
    "#4a8fd9",
    "#e0562f",
    "rgba(128,128,128,.16)",
    "rgba(128,128,128,.35)",
)
"""Colours that are visible on white and on black. Everything else has the colours of the page."""

PAGE = "max-width:72em;font-family:system-ui,sans-serif;font-size:13px;line-height:1.4;color:inherit"
TABLE = "border-collapse:collapse;width:100%;margin:.2em 0 .4em;font-size:inherit;table-layout:auto"
TITLE = "font-weight:600;font-size:1.1em;margin:1em 0 .2em"
NOTE = "opacity:.75;margin:.15em 0"
LINED = f"background:transparent;border:0;border-bottom:1px solid {LINE_COLOR}"
CELL = "padding:.12em .6em;border:0;vertical-align:top;font-family:inherit"
MONO = "font-family:ui-monospace,monospace;font-size:.95em"
CELL_STYLES = {
    "mark": "text-align:left;white-space:nowrap;width:1.5em",
    "name": f"text-align:left;{MONO}",
    "words": "text-align:left;overflow-wrap:anywhere",
    "number": "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums",
    "bar": "text-align:left;width:32%;min-width:6em",
}

REMOVED_STYLES = {"mark": f";color:{REMOVED_COLOR}", "name": ";font-weight:600"}


def render_html(sections: Iterable[Section]) -> str:
    """Write sections as one HTML element.

    Parameters
    ----------
    sections : iterable of Section

    Returns
    -------
    str
        Safe to embed in a page: all text is escaped, and there are no scripts and no external resources.

    Examples
    --------
    >>> Path("report.html").write_text(render_html(sections))         # doctest: +SKIP
    """
    return f'<div style="{PAGE}">{"".join(map(_section, sections))}</div>'


def _section(section: Section) -> str:
    notes = "".join(f'<div style="{NOTE}">{escape(note)}</div>' for note in section.notes)
    more = ""
    if section.more:
        summary = f'<summary style="{NOTE};cursor:pointer">{escape(section.more.title)}</summary>'
        more = f"<details>{summary}{_table(section.more)}</details>"
    return f'<div style="{TITLE}">{escape(section.title)}</div>{_table(section)}{notes}{more}'


def _table(section: Section) -> str:
    if not section.columns:
        return ""
    heads = "".join(map(_head, section.columns)) if any(column.title for column in section.columns) else ""
    head = f'<thead><tr style="{LINED}">{heads}</tr></thead>' if heads else ""
    rows = "".join(_row(section.columns, row) for row in section.rows)
    return f'<table style="{TABLE}">{head}<tbody>{rows}</tbody></table>'


def _head(column: Column) -> str:
    text = escape(column.title)
    if column.kind == "bar":
        left, right = map(escape, column.end_labels)
        text = f'<div style="display:flex;justify-content:space-between"><span>{left}</span><span>{right}</span></div>'
    style = f"{CELL};{CELL_STYLES[column.kind]};font-weight:400;opacity:.75;font-family:inherit;vertical-align:bottom"
    return f'<th scope="col" style="{style}">{text}</th>'


def _row(columns: tuple[Column, ...], row: Row) -> str:
    cells = "".join(_cell(column, cell, row.removed) for column, cell in zip(columns, row.cells, strict=True))
    return f'<tr style="{LINED}">{cells}</tr>'


def _cell(column: Column, cell: str | Bar, removed: bool) -> str:
    text = escape(cell) if isinstance(cell, str) else _bar(cell, REMOVED_COLOR if removed else KEPT_COLOR)
    style = f"{CELL};{CELL_STYLES[column.kind]}"
    if column.kind == "name":
        text = text.replace(".", ".<wbr>")  # a long path may break here
    if removed:
        style += REMOVED_STYLES.get(column.kind, "")
    return f'<td style="{style}">{text}</td>'


def _bar(bar: Bar, color: str) -> str:
    begin, end = bar
    place = f"left:{begin:.2%};width:{end - begin:.2%}"
    inner = f'<div style="position:absolute;top:0;bottom:0;{place};background:{color}"></div>'
    return (
        f'<div aria-hidden="true" style="position:relative;height:.8em;margin:.3em'
        f' 0;background:{TRACK_COLOR}">{inner}</div>'
    )
