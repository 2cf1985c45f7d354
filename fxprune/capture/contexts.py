"""Reads the contexts of torch that are entered now: gradients off, autocast, hooks on saved tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fxprune.runtime.torch_internals import saved_tensor_hooks

_AUTOCAST_DEVICES = ("cpu", "cuda")


@contextmanager
def watch_autocasts() -> Iterator[list[torch.autocast]]:
    """Yield a list of the `torch.autocast` contexts that are entered, which is kept up to date in the block.

    The state of torch does not show a context that switches autocast off where it is off, or that is for a device
    which this machine does not have.

    Examples
    --------
    >>> with watch_autocasts() as entered, torch.autocast("cpu", enabled=False):
    ...     len(entered)
    1
    """
    entered: list[torch.autocast] = []
    enter: Any = torch.autocast.__enter__
    leave: Any = torch.autocast.__exit__

    def enter_watched(self: torch.autocast) -> Any:
        entered.append(self)
        return enter(self)

    def leave_watched(self: torch.autocast, *error: Any) -> Any:
        entered.remove(self)
        return leave(self, *error)

    torch.autocast.__enter__ = enter_watched  # type: ignore[method-assign]
    torch.autocast.__exit__ = leave_watched  # type: ignore[method-assign]
    try:
        yield entered
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
        torch.autocast.__exit__ = leave  # type: ignore[method-assign]


def context_states(autocasts: Sequence[torch.autocast] = ()) -> dict[str, Any]:
    """Return the current state of each kind of context, by its name for messages.

    Parameters
    ----------
    autocasts : sequence of autocast
        Contexts that are entered, from `watch_autocasts`.

    Examples
    --------
    >>> before = context_states()
    >>> with torch.no_grad():
    ...     [name for name, state in context_states().items() if state != before[name]]
    ['torch.no_grad or torch.utils.checkpoint']
    """
    devices = [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in _AUTOCAST_DEVICES]
    return {
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.no_grad or torch.utils.checkpoint": torch.is_grad_enabled(),
        "torch.autocast": (len(autocasts), *devices),
        "torch.utils.checkpoint or hooks on saved tensors": saved_tensor_hooks(),
    }
