"""Small models with removable blocks, images and labels for them, and their FLOPs and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Waves(nn.Module):
    """Two convolutions and a buffer that no file has; without one of the convolutions it becomes a graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.steps: Tensor
        self.register_buffer("steps", torch.linspace(0, 1, width).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.relu(x + self.second(functional.relu(self.first(x)) + 1)) * self.steps


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


class Attention(nn.Module):
    """Attention with a learned bias, written as in libraries of transformers: any rank, modes, optional arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out, self.p = nn.Linear(width, 3 * width), nn.Linear(width, width), 0.2
        self.bias = nn.Parameter(torch.rand(16, 4))
        self.index: Tensor
        self.register_buffer("index", torch.arange(16).flip(0), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        shape = (*tokens.shape[:-1], 2, -1)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.into(tokens).chunk(3, -1))
        bias = self.bias[self.index].mean(1)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value + (mask if mask is not None else 0),
            dropout_p=self.p if self.training else 0.0,
            is_causal=query.shape[2] > 1 and options.get("causal", False),
        )
        attended = attended.transpose(1, 2).reshape(*tokens.shape[:-1], -1)
        return self.out(attended + bias[:, None] if options.get("biased", True) else attended)


class EncoderLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        tokens = tokens + functional.dropout(self.attention(self.norm(tokens), **options), 0.1, self.training)
        return tokens + self.mlp(tokens)


class Encoder(nn.Module):
    """A vision transformer for 16 by 16 pixels and 5 classes; one graph as a whole."""

    def __init__(self, width: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.layers = nn.ModuleList([EncoderLayer(width) for _ in range(layers)])
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, **options)
        return self.fc(tokens.mean(1))


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
