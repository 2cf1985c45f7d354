"""Small models with removable blocks, images and labels for them, and their FLOPs and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Tiny(nn.Module):
    """A classifier of 5 classes with four removable blocks; one graph as a whole."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Detector(nn.Module):
    """Its own forward looks at values, so that `body` and `head` are captured and it stays eager around them."""

    def __init__(self, width: int = 8, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), *(Block(width) for _ in range(4)))
        if head:
            self.head = nn.Sequential(Block(width), nn.Conv2d(width, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(finite(x))).mean((2, 3))


class Eager(nn.Module):
    """A graph with a last layer that is in none: its classes can change and the plan still fits."""

    def __init__(self, classes: int = 5, shift: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Block(8) for _ in range(4)))
        self.weight = nn.Parameter(torch.rand(classes, 8))
        if shift:
            self.shift = nn.Parameter(torch.rand(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(finite(x)).mean((2, 3)) @ self.weight.T + getattr(self, "shift", 0)


def finite(x: Tensor) -> Tensor:
    """Look at the values of an image, which no graph can do; a model that calls this is none."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the image is not finite")
    return x


def build(kind: Callable[..., nn.Module], seed: int = 0, **options: Any) -> nn.Module:
    """A model with weights and running statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**options).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
        return model


def tiny(seed: int = 0) -> nn.Module:
    return build(Tiny, seed)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(count: int = 2, batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(pixels(count, 3, 16, 16, seed=i), torch.arange(count) + i) for i in range(batches)]


def partly_labelled() -> list[Any]:
    """Two labelled batches of two images, and one image without a label."""
    return [*labelled(), pixels(1, 3, 16, 16)]


def squared(model: nn.Module, batch: Any) -> Tensor:
    """A loss of the caller's own."""
    return model(batch[0]).square().mean()


def flops_of(model: nn.Module) -> float:
    """FLOPs per image, counted by torch on two images of 16 by 16 pixels."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels(2, 3, 16, 16))
    return counter.get_total_flops() / 2


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
