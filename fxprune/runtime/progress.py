"""Defines the callback by which long calls report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""``progress(stage, done, total)``; `total` is None if it is not known."""


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Default callback; does nothing."""
