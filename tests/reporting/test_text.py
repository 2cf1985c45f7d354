"""A report as text: in the width of the terminal, and in colour on a console."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import pairwise
from typing import cast

import pytest
from rich.console import Console
from torch import nn

import fxprune
from fxprune.reporting.report import Report
from fxprune.reporting.sections import MAX_BLOCKS
from fxprune.reporting.table_model import format_change, format_quantity
from tests.helpers.plans import HOSTILE, block, plan_of


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def part(report: Report, title: str) -> list[str]:
    """Lines of a report's section, without its title."""
    lines = str(report).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(title))
    return lines[start + 1 : lines.index("", start) if "" in lines[start:] else None]


@pytest.mark.usefixtures("wide")
def test_text_starts_with_before_and_after(report: Report) -> None:
    head, flops, params, blocks = (line.split() for line in part(report, "fxprune removed 2 of 4 candidates"))
    before, after = report.before, report.after
    assert head == ["before", "after", "change"]
    assert flops[3:] == [
        format_quantity(before.flops),
        format_quantity(after.flops),
        format_change(before.flops, after.flops),
    ]
    assert params[1:] == [
        format_quantity(before.params),
        format_quantity(after.params),
        format_change(before.params, after.params),
    ]
    assert blocks == ["blocks", "4", "2", "−2"]


@pytest.mark.usefixtures("wide")
def test_text_shows_bar_costs_and_mark_of_each_block(report: Report) -> None:
    _, *rows = part(report, "Importance by fisher, least first")
    for region, line in zip(report.regions, rows, strict=False):
        assert line.startswith(f"{'✂' if region.removed else ' '}  {region.name} ")
        score, share, params = line.split()[-3:]
        assert float(score) == pytest.approx(region.score, abs=5e-5)
        assert (share, params) == (f"{region.flops / report.before.flops:.1%}", format_quantity(region.params))
    lengths = [line.count("█") for line in rows[:4]]
    assert lengths == sorted(lengths)
    assert lengths[-1] / lengths[1] == pytest.approx(report.regions[-1].score / report.regions[1].score, rel=0.2)


@pytest.mark.usefixtures("wide")
def test_text_names_the_scale_of_the_chart(report: Report) -> None:
    assert "Bars: linear scale from 0." in part(report, "Importance")
    broad = fxprune.report(plan_of([block(f"b{i}", 10.0**-i) for i in range(8)]))
    assert any("log scale from 1e-08 to 1," in line for line in part(broad, "Importance"))
    lengths = [line.count("█") for line in part(broad, "Importance")[1:9]]
    steps = {after - before for before, after in pairwise(lengths)}
    assert max(steps) - min(steps) <= 1


@pytest.mark.usefixtures("wide")
def test_text_bars_of_negative_scores_go_left() -> None:
    report = fxprune.report(plan_of([block("harms", -1.0, removed=True), block("little", 1.0), block("much", 3.0)]))
    head, harms, little, _ = part(report, "Importance")[:4]
    assert (head.split()[1:3], "reach to the left" in str(report)) == (["-1.00", "3.00"], True)
    left, right = (re.search("[█▉▊▋▌▍▎▏▐▕]+", line) for line in (harms, little))
    assert left is not None
    assert right is not None
    assert left.end() - 1 <= right.start() <= left.end()
    assert harms.count("█") == pytest.approx(little.count("█"), abs=1)


ON = {"backend": "eager", "device": "cpu", "images": 8, "threads": 2, "rounds": 15, "floor": 0.0123}


@pytest.mark.usefixtures("wide")
def test_text_shows_milliseconds_when_measured() -> None:
    blocks = [block("slow", 1.0, removed=True, latency_ms=12.34), block("lost", 2.0, latency_ms=0.0)]
    blocks += [block("rest", 3.0, latency_ms=1187.66)]
    plan = replace(plan_of(blocks, settings={"latency": ON}), cost="latency", budget=0.01)
    report = fxprune.report(plan)
    costs = part(report, "This plan removes")
    assert costs[-1].split() == ["latency", "(ms,", "eager,", "predicted)", "1200", "1188", "−1.0%"]
    head, *rows = part(report, "Importance")
    assert head.endswith("params    ms")
    assert [line.split()[-1] for line in rows[:3]] == ["12.3", "0", "1188"]
    made = "\n".join(part(report, "How it was decided"))
    assert all(
        fact in made for fact in ("1% of the latency, 1.0% removed", "eager on cpu, 2 threads, 8 images", "1.2%")
    )


@pytest.mark.usefixtures("wide")
def test_text_without_measured_latency_has_no_milliseconds(plan: fxprune.Plan) -> None:
    assert not re.search(r"\bms\b|latency", str(fxprune.report(plan)))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("other", "shown"), [({"floor": 0.5, "rounds": 3}, True), ({"threads": 1}, False)])
def test_text_compares_milliseconds_of_equal_conditions_only(other: dict[str, int], shown: bool) -> None:
    first, second = (
        plan_of(
            [block("a", 1.0, removed=True, latency_ms=2.0), block("b", 2.0, latency_ms=8.0)], settings={"latency": on}
        )
        for on in (ON, ON | other)
    )
    costs = part(Report((first, second)), "fxprune removed")
    assert any(line.startswith("latency") for line in costs) == shown


@pytest.mark.usefixtures("wide")
def test_text_marks_regions_that_overlap_with_a_removed_one() -> None:
    outer = block("outer", 3.0, nodes=("a", "b"))
    inner = block("inner", 1.0, removed=True, nodes=("a",), block=False)
    twin = block("twin", 2.0, nodes=("b",), block=False)
    chart = part(fxprune.report(plan_of([outer, inner, twin])), "Importance")
    assert [line[0] for line in chart[1:3]] == ["✂", "~"]
    assert any(line.startswith("~ overlaps") for line in chart)
    assert "1 candidate inside" in chart[-1]
    assert "All 3: report.regions" in chart[-1]


@pytest.mark.usefixtures("wide")
def test_text_counts_what_a_long_chart_leaves_out() -> None:
    blocks = [block(f"b{i}", float(i), removed=i in (0, 150)) for i in range(200)]
    inside = [block(f"b{i}.conv", i + 0.5, nodes=(f"b{i}",), block=False) for i in range(0, 200, 2)]
    report = fxprune.report(plan_of([*blocks, *inside]))
    chart = part(report, "Importance")
    assert [line.split()[1] for line in chart if line.startswith("✂  b")] == ["b0", "b150"]
    assert sum("b1" in line or " b" in line for line in chart[1:]) >= MAX_BLOCKS
    assert "100 candidates inside" in chart[-1]
    assert f"{200 - MAX_BLOCKS} more important blocks. All 300" in chart[-1]
    assert len(str(report).splitlines()) < 70


@pytest.mark.usefixtures("wide")
def test_text_lists_rejections_with_reasons(report: Report) -> None:
    _, row, *_, more = part(report, "Cannot be removed")
    assert row.split()[:5] == ["2", "it", "changes", "the", "shape,"]
    assert row.endswith("stem, fc")
    assert "Each of the 2" in more
    assert "report.rejections" in more


@pytest.mark.usefixtures("wide")
def test_text_groups_rejections_by_kind_of_reason() -> None:
    reasons = {f"conv{i}": f"it turns {i}x8 into {i}x4, and no piece fits" for i in range(30)}
    reasons |= {
        "tap": "'add_5' could be its stand-in, but values between them are also read by conv_3",
        "odd": "of its own",
    }
    refused = "\n".join(part(fxprune.report(plan_of([block("b", 1.0)], reasons)), "Cannot be removed"))
    assert "30  it changes the shape" in refused
    assert "conv5 and 24 more" in refused
    assert "conv6" not in refused
    assert all(text in refused for text in ("'add_5'", "of its own", "Each of the 32"))


@pytest.mark.usefixtures("wide")
def test_text_ends_with_the_settings(report: Report) -> None:
    rows = dict(line.split("  ", 1) for line in part(report, "How it was decided"))
    rows = {key: value.strip() for key, value in rows.items()}
    share = 1 - report.after.flops / report.before.flops
    assert rows["budget"] == f"at least 30% of the FLOPs, {share:.1%} removed"
    assert (rows["criterion"], rows["seed"]) == ("fisher", "0")
    assert rows["calibration"].startswith("5 images in 3 batches; targets: labels given")
    assert f"fxprune {fxprune.__version__}, torch" in rows["versions"]


@pytest.mark.usefixtures("wide")
def test_text_shows_scores_of_the_last_pruning_only(pruned_twice: nn.Module, report: Report) -> None:
    total = fxprune.report(pruned_twice)
    assert "Importance by l1 before step 2" in str(total)
    now = {line.split()[1] for line in part(total, "Importance") if line.startswith("✂  ")}
    first, second = (re.split(r"  +", line.strip()) for line in part(total, "Step by step")[1:3])
    assert first[:2] == ["1", ", ".join(region.name for region in report.removed)]
    assert second[:2] == ["2", ", ".join(now)]
    assert len(now) == 1
    assert str(total).startswith("fxprune removed 3 of 4 candidates")


@pytest.mark.parametrize("columns", [40, 80, 160])
def test_text_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    names = [name.replace("\n", " ") for name in HOSTILE]
    report = fxprune.report(
        plan_of([block(name, 2.0**i, i < 2) for i, name in enumerate(names)], dict.fromkeys(names, "?"))
    )
    text = str(report)
    assert max(map(len, text.splitlines())) <= columns
    assert "\x1b" not in text
    head, *rows = part(report, "Importance")
    column = "".join(line[3 if columns > 80 else 2 : head.index(" 0 ")].strip() for line in rows)
    assert names[-1] in column
    assert sum(re.search(r" 10\.0% +1k$", row) is not None for row in rows) == len(names)


@pytest.mark.usefixtures("wide")
def test_text_does_not_read_names_as_markup() -> None:
    text = str(fxprune.report(plan_of([block("[red]e[/red]", 1.0)], {"[b]": "[/]"}, {"note": "[dim]"})))
    assert all(name in text for name in ("[red]e[/red]", "[b]", "[/]", "[dim]"))


def test_console_prints_the_report_in_colour(report: Report) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=120, record=True)
    console.print(report)
    assert "\x1b[1;31m✂" in cast(io.StringIO, console.file).getvalue()
    assert "✂  blocks." in console.export_text()


@pytest.mark.usefixtures("wide")
def test_text_of_a_plan_without_settings_works() -> None:
    bare = plan_of([block("a", 0.0), block("b", float("nan"), flops=0.0)], settings={"versions": None})
    assert "2 more important" not in str(fxprune.report(bare))
    assert "? images in ? batches" in str(fxprune.report(bare))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12, "12"), (999, "999"), (1_000, "1k"), (12_300_000, "12.3M"), (8.7e9, "8.7G"), (1.5e12, "1.5T")],
)
def test_format_quantity_uses_prefixes(value: float, text: str) -> None:
    assert format_quantity(value) == text


@pytest.mark.parametrize("value", [999.6, 999_600, 999_999])
def test_format_quantity_rounds_into_the_next_prefix(value: float) -> None:
    assert format_quantity(value) in ("1k", "1M")


@pytest.mark.parametrize(("after", "text"), [(180, "−10.0%"), (200, "0.0%"), (210, "+5.0%"), (0, "−100.0%")])
def test_format_change_shows_the_sign(after: float, text: str) -> None:
    assert format_change(200, after) == text
