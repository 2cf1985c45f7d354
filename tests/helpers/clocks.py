"""A fake clock, and models whose layers take a given time on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class FakeClock:
    """A clock in seconds, and functions that take a given time on it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def __deepcopy__(self, memo: Any) -> FakeClock:
        return self

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        """Make a function that takes these times call after call; the last one from then on."""
        left = list(seconds)

        def function() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return function

    def slow_down(self, layer: nn.Module, *milliseconds: float) -> None:
        """Let a layer take these times in turn; its copies do so too, and count by themselves."""
        layer.milliseconds = [one / 1e3 for one in milliseconds]  # type: ignore[assignment]
        layer.count = 0  # type: ignore[assignment]

        def hook(module: Any, *_: Any) -> None:
            self.now += module.milliseconds[module.count % len(module.milliseconds)]
            module.count += 1

        layer.register_forward_hook(hook)
