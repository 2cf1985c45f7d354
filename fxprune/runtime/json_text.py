"""JSON that every parser reads, and that may stand in a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def script_safe(value: Any) -> str:
    """JSON that may stand in a script element: no sign in it can end the element."""
    text = plain_json(value)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def plain_json(value: Any) -> str:
    """JSON that every parser reads: what is no finite number is null."""
    return json.dumps(finite(value), separators=(",", ":"), allow_nan=False)


def finite(value: Any) -> Any:
    """Plain data with None for every number that is none."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
