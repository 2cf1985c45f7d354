"""The scale of the importance chart: linear where bars stay readable, else logarithmic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune.reporting.importance_scale import Scale, choose_scale

SCORES = st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20)


def tip(scale: Scale, score: float) -> float:
    begin, end = scale.bar(score)
    return begin if score < 0 else end


@given(SCORES)
def test_bars_stay_in_the_chart_and_in_order(scores: list[float]) -> None:
    scale = choose_scale(scores)
    bars = [scale.bar(score) for score in scores]
    assert all(0 <= begin <= end <= 1 for begin, end in bars)
    tips = [tip(scale, score) for score in sorted(scores)]
    assert tips == sorted(tips)


@given(SCORES)
def test_bars_start_at_one_axis(scores: list[float]) -> None:
    scale = choose_scale(scores)
    axis = scale.bar(0.0)[0]
    for score in scores:
        begin, end = scale.bar(score)
        assert (end if score < 0 else begin) == axis


@pytest.mark.parametrize(
    ("scores", "log"),
    [
        ([1.0, 2.0, 3.0], False),
        ([1e-9, 1e-5, 1.0], True),
        ([1e-9, 0.5, 1.0], False),
        ([0.0, 0.0], False),
        ([5.0], False),
    ],
)
def test_scale_is_linear_where_bars_stay_readable(scores: list[float], log: bool) -> None:
    assert choose_scale(scores).log is log


def test_linear_bars_are_proportional_to_scores() -> None:
    scale = choose_scale([1.0, 2.0, 4.0])
    assert [scale.bar(score) for score in (1.0, 2.0, 4.0)] == [(0, 0.25), (0, 0.5), (0, 1)]
    assert (scale.end_labels, scale.description) == (("0", "4.00"), "Bars: linear scale from 0.")


def test_log_bars_are_proportional_to_decades() -> None:
    scale = choose_scale([3e-4, 1e-3, 1e-2, 1.0, 10.0])
    assert [scale.bar(score)[1] for score in (1e-3, 1e-2, 10.0)] == pytest.approx([0.2, 0.4, 1.0])
    assert scale.end_labels == ("0.0001", "10")
    assert "log scale from 0.0001 to 10" in scale.description


def test_negative_scores_go_to_the_left() -> None:
    scale = choose_scale([-6e-3, 1.3e-2, 0.5, 34.0])
    assert scale.end_labels == ("-0.01", "100")
    begin, axis = scale.bar(-6e-3)
    assert 0 < begin < axis == scale.bar(0.5)[0]
    assert choose_scale([-2.0, -1.0]).bar(-1.0) == (0.5, 1.0)


def test_tiny_scores_do_not_shorten_other_bars() -> None:
    scale = choose_scale([1e-31, 1e-12, 1e-9, 1e-6])
    assert scale.end_labels[0] == "1e-18"
    assert scale.bar(1e-31) == (0, 0)
    assert scale.bar(1e-12)[1] == pytest.approx(0.5)


@pytest.mark.parametrize("score", [0.0, math.nan, math.inf, -math.inf])
def test_zero_score_has_no_bar(score: float) -> None:
    for scale in (choose_scale([1.0, 2.0, score]), choose_scale([1e-9, 1e-5, 1.0, score]), choose_scale([score])):
        assert scale.bar(score)[0] == scale.bar(score)[1]


def test_formatted_scores_of_one_chart_align() -> None:
    fine, coarse, broad = (
        choose_scale([0.11, 0.7]),
        choose_scale([217.0, 1416.4]),
        choose_scale([1e-9, 3.24e-7, 1.0, 0.0]),
    )
    assert [
        fine.format_score(0.11),
        fine.format_score(0.7),
        coarse.format_score(217.0),
        coarse.format_score(1416.4),
    ] == [
        "0.110",
        "0.700",
        "217",
        "1416",
    ]
    assert [broad.format_score(score) for score in (3.24e-7, 1.0, 0.0)] == ["3.24e-07", "1.00e+00", "0"]
    assert choose_scale([3e-9, 2e-9]).format_score(3e-9) == "3.00e-09"
    assert choose_scale([3e9, 2e9]).format_score(3e9) == "3.00e+09"
