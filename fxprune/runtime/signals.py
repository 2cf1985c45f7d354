"""Delays Ctrl-C in blocks that would handle it wrongly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block. For short blocks only.

    torch's fake tensors convert a `KeyboardInterrupt` to a `TypeError`, which then looks like an operation without a
    shape rule. An interrupted symbolic trace may leave modules patched.

    Examples
    --------
    >>> with defer_interrupts():
    ...     pass
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # only the main thread receives signals
        return
    held: list[int] = []

    def hold(number: int, _: FrameType | None) -> None:
        held.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(held[0], None)
