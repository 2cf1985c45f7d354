"""The end of a report: what was measured, with its noise, and what to type next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fxprune import Plan
from fxprune.reporting.measurement_tables import TRAIN_STEP, measured_section, next_steps
from fxprune.reporting.report import Report

LATENCY = {
    "before_ms": 4.0,
    "after_ms": 3.0,
    "ratio": 0.75,
    "error": 0.01,
    "floor": 0.02,
    "device": "cpu",
    "images": 2,
    "batch": 16,
    "rounds": 9,
    "threads": 1,
}
BOXES = {"share": 0.95, "images": 32, "boxes": 180, "mAP": 0.9}


def with_note(plan: Plan, **note: Any) -> Plan:
    entries = {"source": "held out", "images": 32, "agreement": BOXES, "latency": LATENCY, **note}
    return replace(plan, settings=plan.settings.with_entries(measured=entries))


def test_measured_table_has_boxes_their_map_labels_and_milliseconds(plan: Plan) -> None:
    quality = {"name": "mAP", "images": 32, "before": 0.7, "after": 0.69}
    section = measured_section([with_note(plan, quality=quality)], applied=True)
    assert section.title == "Measured on 32 images held out: pruning did not use them"
    assert [row.cells for row in section.rows] == [
        ("boxes found again", "180", "171", "95.0% kept"),
        ("their mAP", "1.000", "0.900", "−0.100"),
        ("mAP on labels", "0.700", "0.690", "−0.010"),
        ("ms per image", "4", "3", "−25.0% ± 2.0%"),
    ]
    assert any("1 thread, 2 images per call (not 16, to save time)" in note for note in section.notes)
    assert not any("within the noise" in note for note in section.notes)


def test_measured_table_of_a_classifier_counts_images(plan: Plan) -> None:
    agreed = {"share": 0.75, "images": 32, "boxes": None, "mAP": None}
    (row, _) = measured_section([with_note(plan, agreement=agreed)], applied=True).rows
    assert row.cells == ("images of the same class", "32", "24", "75.0% kept")


def test_difference_within_the_noise_is_called_so(plan: Plan) -> None:
    section = measured_section([with_note(plan, latency={**LATENCY, "ratio": 0.99})], applied=True)
    assert section.rows[-1].cells[-1] == "−1.0% ± 2.0%"
    assert any("within the noise" in note for note in section.notes)


@pytest.mark.parametrize("note", [{}, {"measured": "yes"}, {"measured": {"agreement": {"share": "?"}, "latency": 3}}])
def test_notes_of_other_versions_are_no_error(plan: Plan, note: dict[str, Any]) -> None:
    section = measured_section([replace(plan, settings=plan.settings.with_entries(**note))], applied=True)
    assert section.rows == ()


def test_report_of_two_steps_says_what_it_compares_with(plan: Plan) -> None:
    section = measured_section([plan, with_note(plan)], applied=True)
    assert "Before: as it was before step 2." in section.notes


def test_next_steps_are_comments_and_calls_in_terminal_and_notebook_only(plan: Plan) -> None:
    steps = next_steps(with_note(plan), applied=True, is_wrapped=False)
    shown = Report((with_note(plan),), next_steps=steps)
    text = str(shown)
    assert text.endswith('# see what went and what stayed\nfxprune.draw(pruned, "pruned.html")')
    assert "# see what went" in shown._repr_html_()
    assert "fxprune.draw" not in shown.to_markdown()
    assert "95.0% kept" in shown.to_markdown()


def test_next_steps_fit_the_model_and_what_was_measured(plan: Plan) -> None:
    def calls(plan: Plan, applied: bool = True, is_wrapped: bool = False) -> str:
        return " ".join(call for call, _ in next_steps(plan, applied, is_wrapped))

    assert "agreement(" in calls(plan)
    assert "agreement(" not in calls(with_note(plan))
    assert "evaluate(" not in calls(plan)
    assert "evaluate(" in calls(replace(plan, settings=plan.settings.with_entries(boxes=3)))
    assert "apply(model, plan)" in calls(plan, applied=False)
    assert TRAIN_STEP in next_steps(plan, True, is_wrapped=True)
