"""Scales of bar charts: the length of the bar of each score, and a description of the scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MAX_DECADES = 12
"""Maximum number of powers of ten on a log scale."""
MAX_READABLE_RATIO = 20
"""Bars are too short to compare if the longest is more than this many times as long."""
MIN_BAR_WIDTH = 1 / 80
"""Minimum length of the bar of a nonzero score: one eighth of a character if the chart has ten characters."""


@dataclass(frozen=True)
class Scale:
    """Scale of a bar chart: computes the begin and end of bars.

    Attributes
    ----------
    left, right : float
        Lengths of the left side, for negative scores, and of the right side: in powers of ten if `log`, else in units
        of the scores.
    log : bool
        Whether the scale is logarithmic.
    min_exponent : int
        Exponent of the power of ten at which the bars of a log scale have length 0.

    Examples
    --------
    >>> Scale(left=0, right=4, log=False).bar(1.0)
    (0.0, 0.25)
    >>> Scale(left=1, right=3, log=True, min_exponent=-2).bar(-0.1)
    (0.0, 0.25)
    """

    left: float
    right: float
    log: bool
    min_exponent: int = 0

    def bar(self, score: float) -> tuple[float, float]:
        """Return the begin and end of the bar of a score, as fractions of the width of the chart."""
        whole = self.left + self.right
        origin = self.left / whole
        reach = self._length(abs(score)) / whole
        reach = max(reach, MIN_BAR_WIDTH) if reach else 0.0
        return (max(origin - reach, 0.0), origin) if score < 0 else (origin, min(origin + reach, 1.0))

    def _length(self, size: float) -> float:
        if not math.isfinite(size) or not size:
            return 0.0
        return max(math.log10(size) - self.min_exponent, 0.0) if self.log else size

    @property
    def end_labels(self) -> tuple[str, str]:
        """Labels of the left and the right end of the chart."""
        return (f"-{self._value(self.left)}" if self.left else self._value(0.0)), self._value(self.right)

    def _value(self, length: float) -> str:
        return f"{10.0 ** (self.min_exponent + length):g}" if self.log else self.format_score(length) if length else "0"

    @property
    def description(self) -> str:
        """Description of the scale, for the reader of a chart."""
        least, most = self._value(0.0), self._value(max(self.left, self.right))
        kind = (
            f"log scale from {least} to {most}, equal lengths are equal factors" if self.log else "linear scale from 0"
        )
        return f"Bars: {kind}{'; negative scores reach to the left' if self.left else ''}."

    def format_score(self, score: float) -> str:
        """Format a score; the scores of one chart have the same number of decimals."""
        if self.log:
            return f"{score:.2e}" if score else "0"
        decimals = 2 - math.floor(math.log10(max(self.left, self.right)))
        return f"{score:.{max(decimals, 0)}f}" if -4 <= decimals <= 5 else f"{score:.2e}"


def choose_scale(scores: Iterable[float]) -> Scale:
    """Choose the scale for scores: linear, or logarithmic if half of the bars would be too short to compare.

    Examples
    --------
    >>> choose_scale([0.2, 0.5, 0.8]).log, choose_scale([1e-7, 1e-5, 1.0]).log
    (False, True)
    """
    known = [score for score in scores if math.isfinite(score) and score]
    least, most = min([0.0, *known]), max([0.0, *known])
    sizes = sorted(map(abs, known))
    if not sizes or sizes[len(sizes) // 2] * MAX_READABLE_RATIO >= sizes[-1]:
        return Scale(left=-least, right=most if sizes else 1.0, log=False)
    top = math.ceil(math.log10(sizes[-1]))
    foot = max(math.ceil(math.log10(sizes[0])) - 1, top - MAX_DECADES)
    sides = [max(math.ceil(math.log10(size)) - foot, 0) if size else 0 for size in (-least, most)]
    return Scale(left=sides[0], right=sides[1], log=True, min_exponent=foot)
