"""Ctrl-C, held back where it would be taken for something else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Let an interruption wait for the end of the block, as long as that is short.

    torch's fake tensors make a `TypeError` of a `KeyboardInterrupt`, which then looks like an operation without a
    shape rule, and symbolic tracing may leave modules patched behind it.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # signals come to the main thread alone
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
