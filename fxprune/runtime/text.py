"""Formats lists for messages and reports."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(items: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Join the first `most` items and add the number of further items.

    Examples
    --------
    >>> first_few(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
