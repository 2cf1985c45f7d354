"""How a long call tells its caller of progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""``progress(stage, done, total)``; `total` is None where it is not known."""


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody asked for."""
