"""JSON that every parser reads, and that may stand in a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dump_script_json(value: Any) -> str:
    """JSON that may stand in a script element: no sign in it can end the element."""
    text = dump_plain_json(value)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def dump_plain_json(value: Any) -> str:
    """JSON that every parser reads: what is no finite number is null."""
    return json.dumps(replace_nonfinite(value), separators=(",", ":"), allow_nan=False)


def replace_nonfinite(value: Any) -> Any:
    """Plain data with None for every number that is none."""
    if isinstance(value, Mapping):
        return {key: replace_nonfinite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nonfinite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
