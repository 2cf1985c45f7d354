"""Copies models, and restores the random state, so that the caller's are not changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from fxprune.errors import ModelError
from fxprune.runtime.distributed import equal_on_all_ranks


def private_copy(network: nn.Module, keep_precision: bool = False) -> nn.Module:
    """Copy a network, so that the caller's network is not changed.

    Parameters
    ----------
    network : Module
        The caller's network.
    keep_precision : bool
        Whether the copy keeps its precision and its `requires_grad` flags. If False, the copy is in float32, because
        scores underflow in half precision and many CPU kernels do not support it, and no weight requires gradients.

    Returns
    -------
    Module
        A deep copy.

    Raises
    ------
    ModelError
        If the network cannot be copied; the message says why.

    Examples
    --------
    >>> private_copy(nn.Linear(2, 2).half()).weight.dtype
    torch.float32
    """
    try:
        twin = copy.deepcopy(network)
    except Exception as error:  # deepcopy runs the model's own code, which may raise any error
        raise ModelError(
            f"{type(network).__name__} cannot be copied ({type(error).__name__}: {error}); fxprune works on a copy."
            " Detach tensors that the model keeps from its last run, or build it again"
        ) from error
    copies = dict(twin.named_modules())
    for name, old in network.named_modules():
        new = copies.get(name)
        if isinstance(old, fx.GraphModule) and isinstance(new, fx.GraphModule):
            type(new).__name__ = type(old).__name__  # deepcopy loses it; every graph module has its own class
    return twin if keep_precision else twin.float().requires_grad_(False)


def check_same_weights(network: nn.Module) -> None:
    """Raise `ModelError` unless all processes hold the same weights."""
    values = (*network.parameters(), *network.buffers())
    if not equal_on_all_ranks(lambda: sum(float(value.detach().double().abs().sum()) for value in values)):
        raise ModelError(
            f"the processes hold {type(network).__name__} with different weights; load one file in all of them, or"
            " set one seed before it is built"
        )


@contextmanager
def preserve_rng_state(network: nn.Module) -> Iterator[None]:
    """Restore torch's random state, on the CPU and on the network's devices, at the end of the block."""
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        yield
