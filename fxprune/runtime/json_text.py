"""Texts for files, pages and messages: JSON that every parser reads, and short lists in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def dump_script_json(value: Any) -> str:
    """Write JSON for an HTML script element: ``<``, ``>`` and ``&`` are escaped, so it cannot end the element."""
    text = dump_plain_json(value)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def dump_plain_json(value: Any) -> str:
    """Write compact JSON that every parser reads: NaN and infinity become null."""
    return json.dumps(replace_nonfinite(value), separators=(",", ":"), allow_nan=False)


def replace_nonfinite(value: Any) -> Any:
    """Copy plain data and replace NaN and infinity by None.

    Examples
    --------
    >>> replace_nonfinite({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_few(items: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Join the first `most` items and add the number of further items.

    Examples
    --------
    >>> first_few(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
