"""Checks that an error leaves the model unchanged, and helpers for invalid input."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fxprune

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that could be changed behind its owner's back, tensors cloned."""
    values = [*model.named_parameters(), *model.named_buffers()]
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "in place": {name: getattr(module, "inplace", None) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {n: [len(getattr(module, hook)) for hook in HOOKS] for n, module in model.named_modules()},
        "tensors": {name: (id(value), value.dtype, value._version) for name, value in values},
        "requires_grad": {name: value.requires_grad for name, value in values},
        "grad": {name: value.grad is None for name, value in values},
        "values": {name: value.detach().clone() for name, value in values},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    old, new = before.pop("values"), after.pop("values")
    assert after == before
    assert old.keys() == new.keys()
    assert [name for name, value in old.items() if not value.is_meta and not torch.equal(value, new[name])] == []


@contextmanager
def assert_unchanged(model: nn.Module) -> Iterator[None]:
    """Hold a block to leave a model, torch's random state and its gradient mode as they were."""
    before, random, gradients = snapshot(model), torch.get_rng_state(), torch.is_grad_enabled()
    yield
    assert_same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled() is gradients


@contextmanager
def assert_refused(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
    """Hold a block to raise an error whose message matches, and to leave the model as it was."""
    with assert_unchanged(model), pytest.raises(error, match=match) as caught:
        yield
    assert isinstance(caught.value, fxprune.FxpruneError)


def removed(pruned: nn.Module) -> list[str]:
    return sorted(region.name for region in fxprune.report(pruned).removed)


class Unread:
    """A loader that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        pytest.fail("the loader was read before the settings were checked")
        yield


def changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy plain data with one field set, or gone for `...`; ``regions[0].exit`` names it."""
    data = copy.deepcopy(data)
    *way, last = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", path)]
    place: Any = data
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data
