"""A report as a table: in the terminal's width, with colour on a console."""

from __future__ import annotations

import io
from typing import cast

import pytest
from rich.console import Console
from torch import nn

import fxprune
from fxprune.report import Report, quantity
from tests.hostile import removed


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """Cells of a report's table of regions, by region name."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    table = [line for line in lines if len(line) == 6]
    assert len({line[1] for line in table}) == len(table)
    return {line[1]: tuple(line) for line in table}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.usefixtures("wide")
def test_each_region_has_a_row_and_the_removed_ones_a_mark(report: Report) -> None:
    table = rows(str(report))
    assert list(table) == [region.name for region in report.regions]
    assert {name: cells[0] for name, cells in table.items()} == {
        region.name: "✂" if region.removed else "" for region in report.regions
    }
    for region in report.regions:
        share = f"{100 * region.flops / report.before.flops:.1f}%"
        expected = (region.name, region.kind, f"{region.score:.3g}", share, quantity(region.params))
        assert table[region.name][1:] == expected


@pytest.mark.usefixtures("wide")
def test_the_table_opens_with_before_and_after(report: Report) -> None:
    lines = {line.split("  ")[0].strip(): line.split() for line in str(report).splitlines()[:4]}
    assert lines["FLOPs per image"][3:5] == [quantity(report.before.flops), quantity(report.after.flops)]
    assert lines["FLOPs per image"][5] == f"{1 - report.after.flops / report.before.flops:.1%}"
    assert lines["parameters"][1:3] == [quantity(report.before.params), quantity(report.after.params)]
    assert lines["blocks"][1:] == ["4", "2", "2"]


@pytest.mark.usefixtures("wide")
def test_the_table_closes_with_the_settings(report: Report) -> None:
    last = " ".join(str(report).split())[-400:]
    assert "removed 2 of 4 candidates for a budget of 0.3 of flops, by fisher on 5 images" in last
    assert "seed 0" in last


@pytest.mark.usefixtures("wide")
def test_the_table_says_what_cannot_go_and_why(report: Report) -> None:
    refused = str(report).split("Not removable")[1]
    assert all(rejection.name in refused for rejection in report.rejections)
    assert "it changes the shape" in refused


@pytest.mark.usefixtures("wide")
def test_the_table_of_two_prunings_marks_both(pruned_twice: nn.Module) -> None:
    report = fxprune.report(pruned_twice)
    table = rows(str(report))
    assert {name for name, cells in table.items() if cells[0] == "✂"} == set(removed(pruned_twice))
    assert len(table) == 4
    assert "removed 3 of 4 candidates" in " ".join(str(report).split())


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_text_keeps_to_the_terminal(report: Report, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = str(report)
    assert max(map(len, text.splitlines())) <= int(columns)
    assert "\x1b" not in text
    assert text.count("✂") == 3
    assert str(report) == text


def test_a_console_prints_the_table_with_colour(report: Report) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=120, record=True)
    console.print(report)
    assert "\x1b[" in cast(io.StringIO, console.file).getvalue()
    assert set(rows(console.export_text())) == {region.name for region in report.regions}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12, "12"), (999, "999"), (1_000, "1k"), (12_300_000, "12.3M"), (8.7e9, "8.7G"), (1.5e12, "1.5T")],
)
def test_quantities_have_prefixes(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize("value", [999.6, 999_600, 999_999])
def test_quantities_round_into_the_next_prefix(value: float) -> None:
    assert quantity(value) in ("1k", "1M")
