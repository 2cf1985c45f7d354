"""Tables of steps, search and healing, in every form of the report."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from torch import nn

import fxprune
from fxprune.reporting.history_tables import format_signed
from fxprune.reporting.report import Report
from tests.helpers.models import labelled
from tests.helpers.plans import block, plan_of

HEAL = {"method": "mimic", "images": 256, "steps": 400, "distance": {"before": 0.48, "after": 0.12}, "seconds": 93.0}
SEARCH = {"strategy": "search", "tried": 7, "mended": "affine"}


def steps(*losses: float | None, **settings: Any) -> Report:
    """A report of as many prunings, each of the first of what blocks are left of four."""
    plans = []
    for number, loss in enumerate(losses):
        left = [block(f"b{index}", float(index), removed=index == number) for index in range(number, 4)]
        facts = {} if loss is None else {"loss_increase": loss}
        plans.append(plan_of(left, settings={**settings, **facts}))
    return Report(tuple(plans))


def text(report: Report, monkeypatch: pytest.MonkeyPatch, columns: int = 120) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return str(report)


def rows(report: Report, title: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    lines = text(report, monkeypatch).splitlines()
    start = lines.index(title)
    return [line.split() for line in lines[start + 1 : lines.index("", start)]]


# Step by step --------------------------------------------------------------------------------------------------------


def test_step_table_adds_up_savings(monkeypatch: pytest.MonkeyPatch) -> None:
    report = steps(0.01, -0.002, **SEARCH)
    head, first, second, *notes = rows(report, "Step by step", monkeypatch)
    assert " ".join(head) == "step removed FLOPs so far loss"
    assert first == ["1", "b0", "−25.0%", "+0.01"]
    assert second == ["2", "b1", "−50.0%", "−0.002"]
    assert " ".join(notes[0]).startswith("1: at least 10% of the FLOPs, 25.0% removed; by fisher; ")
    assert " ".join(notes[1]).startswith("2: at least 10% of the FLOPs")
    assert " ".join(notes[2]).startswith("loss: its increase")
    assert text(report, monkeypatch).startswith("fxprune removed 2 of 4 candidates in 2 steps\n")


def test_step_table_has_a_column_for_the_budget_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [replace(plan, cost="blocks") for plan in steps(None, None).plans]
    head, first, second, *_ = rows(Report(tuple(plans)), "Step by step", monkeypatch)
    assert " ".join(head) == "step removed FLOPs so far blocks so far"
    assert (first[2:], second[2:]) == (["−25.0%", "−25.0%"], ["−50.0%", "−50.0%"])


def test_step_table_is_left_out_for_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Step by step" not in text(steps(0.1), monkeypatch)


def test_step_table_notes_the_settings_of_each_step(pruned_twice: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    report = fxprune.report(pruned_twice)
    lines = [" ".join(row) for row in rows(report, "Step by step", monkeypatch)]
    assert any(line.startswith("1: at least 30% of the FLOPs") and "by fisher" in line for line in lines)
    assert any(line.startswith("2: at least 20% of the parameters") and "by l1" in line for line in lines)


def test_steps_are_immutable_and_plain_data() -> None:
    report = steps(0.01, None)
    assert [step.removed for step in report.steps] == [("b0",), ("b1",)]
    assert [step.after.blocks for step in report.steps] == [3, 2]
    assert report.steps[-1].after == report.after
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert [row["loss_increase"] for row in data["steps"]] == [0.01, None]


# Found by a search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mended", "words"), [("affine", "its loss after healing;"), ("none", "its loss;")])
def test_search_section_says_how_many_plans_were_tried(
    mended: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = text(steps(0.0123, strategy="search", tried=7, mended=mended), monkeypatch)
    assert all(part in said for part in ("7 plans tried", words, "+0.0123", "of 7 plans"))
    assert "summed importance" not in said


def test_settings_shown_elsewhere_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    report = steps(0.01, 0.02, heal=HEAL, **SEARCH)
    said = text(report, monkeypatch)
    assert "search: 7 plans tried" in said
    keys = {line.split()[0] for line in said.partition("How it was decided\n")[2].partition("\n\n")[0].splitlines()}
    assert {"budget", "criterion", "strategy"} <= keys
    assert not keys & {"heal", "tried", "loss_increase", "mended"}


# Healed --------------------------------------------------------------------------------------------------------------


def test_healing_table_has_method_images_steps_and_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    head, row, *notes = rows(steps(None, heal=HEAL), "Healed", monkeypatch)
    assert " ".join(head) == "method images steps distance before after change"
    assert row == ["mimic", "256", "400", "0.48", "0.12", "−75.0%"]
    assert "trained" in " ".join(notes[0])


@pytest.mark.parametrize(("share", "said"), [(1.0, False), (0.25, True), (0.0, True), ("strange", False)])
def test_healing_table_tells_a_partial_interpolation(share: Any, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = text(steps(None, heal=HEAL | {"share": share}), monkeypatch)
    assert ("of the weight change" in words) == said
    assert not said or f"{share:.0%} of the weight change was applied" in words


def test_healing_table_has_the_loss_when_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = HEAL | {"loss": {"before": 1.234, "after": 0.0567}}
    head, row, *notes = rows(steps(None, heal=judged), "Healed", monkeypatch)
    assert " ".join(head[-3:]) == "loss before after"
    assert row[-3:] == ["−75.0%", "1.2", "0.057"]
    assert any(" ".join(note).startswith("Loss: its absolute change") for note in notes)
    assert rows(steps(None, heal=HEAL | {"loss": {"after": None}}), "Healed", monkeypatch)[1][-2:] == ["?", "?"]


def test_healing_table_without_training_has_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    note = {"method": "affine", "images": 8, "distance": {"before": None, "after": None}}
    head, row, *_ = rows(steps(None, heal=note), "Healed", monkeypatch)
    assert "steps" not in head
    assert row == ["affine", "8", "?", "?"]


def test_report_of_a_plan_has_no_healing_table() -> None:
    plan = steps(None, heal=HEAL).plans[0]
    assert "Healed" in str(Report((plan,)))
    assert "Healed" not in str(fxprune.report(plan))


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_history_tables_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = HEAL | {"loss": {"before": 1.234, "after": 0.0567}}
    said = text(steps(0.01, 1e-9, 123.0, heal=judged, **SEARCH), monkeypatch, columns)
    assert max(map(len, said.splitlines())) <= columns
    assert all(part in said for part in ("+1e-09", "+123", "−75.0%"))


@pytest.mark.parametrize("strange", [None, "much", {"before": "x"}, [1]])
def test_malformed_history_can_be_shown(strange: Any) -> None:
    report = steps(
        None, None, heal={"distance": strange, "loss": strange}, loss_increase=strange, tried=strange, strategy=strange
    )
    Console(file=None, quiet=True).print(report)
    assert "Step by step" in report.to_markdown()


def test_format_signed_shows_the_sign() -> None:
    assert [format_signed(value) for value in (0.01234, -2.0, 0.0, None)] == ["+0.0123", "−2", "+0", ""]


# Of real models ------------------------------------------------------------------------------------------------------


def test_compile_with_search_reports_its_tries(tiny_model: nn.Module) -> None:
    report = fxprune.report(fxprune.compile(tiny_model, labelled(), 0.3, strategy="search", tries=2))
    assert report.settings["tried"] == 2
    assert "search: 2 plans tried" in report.to_markdown().replace("\\", "")
