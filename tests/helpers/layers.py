"""Transformer layers that read a second value, in models that are one graph each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Mixer(nn.Module):
    """Attention of one head, without a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = self.query(queries) @ self.key(keys).transpose(1, 2)
        weights = weights if mask is None else weights + mask
        return self.out(weights.softmax(-1) @ self.value(values))


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width))


class PostNormLayer(nn.Module):
    """Adds positions to queries and keys; a norm follows each sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = Mixer(width), mlp(width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, positions: Tensor, tokens: Tensor) -> Tensor:
        placed = tokens + positions
        mixed = functional.dropout(self.attention(placed, placed, tokens), 0.1, self.training)
        tokens = self.first(tokens + mixed)
        return self.second(self.mlp(tokens) + tokens)


class PreNormLayer(nn.Module):
    """Attends to itself and to a memory, with a mask; a norm precedes each branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.cross, self.mlp = Mixer(width), Mixer(width), mlp(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, tokens: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        normed = self.norms[0](tokens)
        tokens = tokens + self.own(normed, normed, normed)
        tokens = tokens + self.cross(self.norms[1](tokens), memory, memory, mask)
        return tokens + self.mlp(self.norms[2](tokens)), None


class TwoStreamLayer(nn.Module):
    """Reads two streams of the same shape and continues the second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = mlp(width), mlp(width)

    def forward(self, other: Tensor, tokens: Tensor) -> Tensor:
        tokens = tokens + self.one(other)
        return functional.relu(self.two(tokens) + tokens)


class AddsPositions(nn.Module):
    """Adds its second value to the first, and then branches to the sum of both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = mlp(width), mlp(width)

    def forward(self, positions: Tensor, tokens: Tensor) -> Tensor:
        tokens = positions + tokens
        tokens = tokens + self.one(tokens)
        return tokens + self.two(tokens)


class Layered(nn.Module):
    """Layers on the tokens of an image; each also reads a second value that is computed from the image."""

    def __init__(self, layer: type[nn.Module], layers: int = 2, width: int = 4) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, width, 4, stride=4), nn.Conv2d(3, width, 4, stride=4)
        self.layers = nn.ModuleList(layer(width) for _ in range(layers))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens, side = (stem(x).flatten(2).transpose(1, 2).contiguous() for stem in (self.stem, self.side))
        for layer in self.layers:
            tokens = self.call(layer, tokens, side)
        return self.fc(tokens.mean(1))

    def call(self, layer: nn.Module, tokens: Tensor, side: Tensor) -> Any:
        return layer(side, tokens)


class Decoder(Layered):
    """Layers with a memory and a mask."""

    def call(self, layer: nn.Module, tokens: Tensor, side: Tensor) -> Any:
        return layer(tokens, memory=side, mask=torch.tanh(side.mean((1, 2), keepdim=True)))[0]
