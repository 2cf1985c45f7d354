"""A report as HTML and as Markdown: the same cells, escaped, without external files."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from torch import nn

import fxprune
from fxprune.reporting.report import Report
from tests.helpers.plans import HOSTILE, block, plan_of


class Tables(HTMLParser):
    """Rows of cells of every table, those in <details> apart; and every tag there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.folded: list[list[list[str]]] = []
        self.tags: list[str] = []
        self._into = self.tables
        self._cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "details":
            self._into = self.folded
        if tag == "table":
            self._into.append([])
        if tag == "tr":
            self._into[-1].append([])
        if tag in ("td", "th"):
            self._cell = True
            self._into[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "details":
            self._into = self.tables
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self._into[-1][-1][-1] += data


def html_tables(report: Report) -> Tables:
    return Tables(report._repr_html_())


def markdown_tables(report: Report) -> Tables:
    return Tables(MarkdownIt("commonmark").enable("table").render(report.to_markdown()))


def cells(tables: Tables) -> list[list[list[str]]]:
    """Body cells in one line each, bars left out; a heading without any text is none."""
    bodies = []
    for table in tables.tables:
        bar = 2 if table[0][:2] == ["", "block"] else None
        rows = [[" ".join(cell.split()) for index, cell in enumerate(row) if index != bar] for row in table]
        bodies.append([row for row in rows if any(row)])
    return bodies


@pytest.fixture(scope="module")
def hostile() -> Report:
    """A report whose every text is a name that a page must not take for its own."""
    regions = [block(name, 10.0**-i, removed=i % 2 == 0) for i, name in enumerate(HOSTILE)]
    return fxprune.report(
        plan_of(regions, {name: f"{i} {name}" for i, name in enumerate(HOSTILE)}, {"note": HOSTILE[0]})
    )


def test_html_and_markdown_have_the_same_cells(report: Report, hostile: Report, pruned_twice: nn.Module) -> None:
    for one in (report, hostile, fxprune.report(pruned_twice)):
        *page, following = cells(html_tables(one))
        assert page == cells(markdown_tables(one))
        assert len(page) == 4 + (len(one.plans) > 1) + ("heal" in one.settings) + ("measured" in one.settings)
        assert following[0][0].startswith("#")


def test_html_escapes_names(hostile: Report) -> None:
    names = [" ".join(name.split()) for name in HOSTILE]
    for tables in (html_tables(hostile), markdown_tables(hostile)):
        assert [row[1] for row in cells(tables)[1][1:]] == names[::-1]
        assert {row[2] for row in cells(tables)[2][1:]} == set(names)


def test_html_has_only_text_bars_and_tables(hostile: Report) -> None:
    page = html_tables(hostile)
    tags = {"div", "span", "table", "thead", "tbody", "tr", "th", "td", "wbr", "details", "summary"}
    assert set(page.tags) <= tags
    assert not re.search(r"https?:|url\(|@import", hostile._repr_html_())
    tags = {"h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "strong"}
    assert set(markdown_tables(hostile).tags) == tags


def test_html_folds_rows_that_text_only_counts() -> None:
    blocks = [block(f"b{i}", float(i), removed=i == 0) for i in range(200)]
    inside = [block(f"b{i}.conv", i + 0.5, nodes=(f"b{i}",), block=False) for i in range(200)]
    reasons = {f"c{i}": f"it turns {i}x8 into {i}x4, and no piece fits" for i in range(50)}
    report = fxprune.report(plan_of([*blocks, *inside], reasons))
    page = html_tables(report)
    hidden, refused = page.folded
    assert sorted(row[1] for row in [*page.tables[1][1:], *hidden[1:]]) == sorted(one.name for one in report.regions)
    assert [tuple(row) for row in refused[1:]] == list(reasons.items())
    written = report.to_markdown()
    assert "200 candidates inside" in written
    assert "160 more important blocks" in written


def test_html_bars_have_the_length_of_the_scale(report: Report) -> None:
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%;background:#", report._repr_html_())]
    scores = [region.score for region in report.regions]
    assert widths == pytest.approx([max(100 * score / max(scores), 1.25) for score in scores], abs=0.01)


def test_markdown_bars_keep_their_spaces() -> None:
    report = fxprune.report(plan_of([block("harms", -1.0), block("little", 1.0), block("much", 3.0)]))
    harms, little, much = (row[2] for row in markdown_tables(report).tables[1][1:])
    assert (harms, little, much) == ("█" * 6, "\u00a0" * 6 + "█" * 6, "\u00a0" * 6 + "█" * 18)


def test_html_marks_removed_regions_by_more_than_colour(report: Report) -> None:
    page = report._repr_html_()
    assert page.count("✂</td>") == page.count('font-weight:600"') == 2
    assert report.to_markdown().count("| ✂ | **`blocks.") == 2
