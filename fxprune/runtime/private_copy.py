"""Copies models, and restores the state of models and of the random numbers, so that the caller's are not changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import ModelError
from fxprune.runtime.distributed import equal_on_all_ranks
from fxprune.runtime.function_copies import rebind_functions


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
        A deep copy. Functions that are set on its modules (`forward`, hooks) refer to its modules, as those of the
        caller's network refer to the caller's modules.

    Raises
    ------
    ModelError
        If the network cannot be copied; the message says why.

    Examples
    --------
    >>> private_copy(nn.Linear(2, 2).half()).weight.dtype
    torch.float32
    """
    memo: dict[int, Any] = {}
    try:
        twin = copy.deepcopy(network, memo)
        rebind_functions(twin, memo)
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


MODULE_FIELDS = frozenset(nn.Module().__dict__)
"""Names of the instance attributes that torch itself gives every module."""


@contextmanager
def preserve_state(network: nn.Module, where: Callable[[Any], bool] = lambda value: True) -> Iterator[None]:
    """Restore the buffers of a network and the attributes of its modules at the end of the block.

    Lists and dicts among the attributes get their items back. Weights, modules, modes and hooks are not touched.

    Parameters
    ----------
    network : Module
        The network.
    where : callable
        ``(value) -> bool``: whether an attribute that has this value at the end of the block is restored.

    Examples
    --------
    >>> layer = nn.BatchNorm1d(2)
    >>> with preserve_state(layer):
    ...     layer.running_mean += 1
    ...     layer.last = "seen"
    >>> layer.running_mean, hasattr(layer, "last")
    (tensor([0., 0.]), False)
    """
    undo = [_remember_module(module, where) for module in network.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for restore in undo:
            restore()
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _remember_module(module: nn.Module, where: Callable[[Any], bool]) -> Callable[[], None]:
    """Return a function that gives a module its present attributes and buffers back, if `where` is true for them."""
    kind, fields = type(module), vars(module)
    attributes = {key: (value, _items(value)) for key, value in fields.items() if key not in MODULE_FIELDS}
    buffers = dict(module.named_buffers(recurse=False))

    def restore() -> None:
        if type(module) is not kind:
            return  # a lazy module, which became another kind at its first call
        wrong = {key for key, value in fields.items() if key not in MODULE_FIELDS and where(value)}
        for key in wrong - attributes.keys():
            del fields[key]
        for key, (value, items) in attributes.items():
            if key in fields and key not in wrong:
                continue
            if key in dict(module.named_children()):  # a module that replaced the attribute, such as a first criterion
                if not where(getattr(module, key)):
                    continue
                delattr(module, key)
            fields[key] = value
            if items is not None:
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(items)
        found = dict(module.named_buffers(recurse=False))
        for key in {**buffers, **found}:
            if found.get(key) is not buffers.get(key):
                setattr(module, key, buffers.get(key))

    return restore


def _items(value: Any) -> list[Any] | dict[Any, Any] | None:
    """Return a copy of a list or dict; None for other values."""
    return value.copy() if type(value) in (list, dict) else None


@contextmanager
def weights_require_gradients(model: nn.Module, required: bool) -> Iterator[None]:
    """Let all weights of a model require gradients, or none, until the end of the block.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> with weights_require_gradients(layer, False):
    ...     layer.weight.requires_grad
    False
    """
    before = [(weight, weight.requires_grad) for weight in model.parameters() if weight.is_floating_point()]
    try:
        for weight, _ in before:
            weight.requires_grad_(required)
        yield
    finally:
        for weight, was in before:
            weight.requires_grad_(was)


@contextmanager
def preserve_rng_state(network: nn.Module) -> Iterator[None]:
    """Restore torch's random state, on the CPU and on the network's devices, at the end of the block."""
    devices = {parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        yield
