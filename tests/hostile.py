"""A tiny classifier, hostile input for it, and the proof that a caller's model is left bit for bit as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Tiny(nn.Module):
    """A classifier of 5 classes with four removable blocks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def tiny(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny().eval()


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(count: int = 2, batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(pixels(count, 3, 16, 16, seed=i), torch.arange(count) + i) for i in range(batches)]


def squared(model: nn.Module, batch: Any) -> Tensor:
    """A loss of the caller's own."""
    return model(batch[0]).square().mean()


# What the caller owns, before and after ------------------------------------------------------------------------------


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
def unchanged(model: nn.Module) -> Iterator[None]:
    """Hold a block to leave a model, torch's random state and its gradient mode as they were."""
    before, random, gradients = snapshot(model), torch.get_rng_state(), torch.is_grad_enabled()
    yield
    assert_same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled() is gradients


@contextmanager
def refused(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
    """Hold a block to raise an error whose message matches, and to leave the model as it was."""
    with unchanged(model), pytest.raises(error, match=match) as caught:
        yield
    assert isinstance(caught.value, fxprune.FxpruneError)


def removed(pruned: nn.Module) -> list[str]:
    return sorted(region.name for region in fxprune.report(pruned).removed)


class Unread:
    """A loader that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        pytest.fail("the loader was read before the settings were checked")
        yield
