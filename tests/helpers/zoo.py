"""Small models with a table, written by hand, of their regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(channels: int, out: int | None = None, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(channels, out or channels, 3, stride=stride, padding=1)


class Chain(nn.Module):
    """stem, then two shape-preserving layers with what finishes them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.one, self.norm, self.act = conv(4), nn.BatchNorm2d(4), nn.ReLU()
        self.two = conv(4)
        self.head = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.one(self.stem(x))))
        x = functional.relu(self.two(x))
        return self.head(x)


class Residual(nn.Module):
    """A block with an identity shortcut, then one whose shortcut is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.a, self.b = conv(4, 6), conv(6, 4)
        self.c, self.down = conv(4, 8, stride=2), nn.Conv2d(4, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(x + self.b(functional.relu(self.a(x))))
        return functional.relu(self.c(x) + self.down(x))


class Pyramid(nn.Module):
    """A feature pyramid: top-down sums at the size of the finer map, and a smoothing convolution each."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(3, 4), conv(4, 8, stride=2)
        self.lateral_fine, self.lateral_coarse = nn.Conv2d(4, 5, 1), nn.Conv2d(8, 5, 1)
        self.smooth_fine, self.smooth_coarse = conv(5), conv(5)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        top = self.lateral_coarse(coarse)
        side = self.lateral_fine(fine)
        merged = side + functional.interpolate(top, size=side.shape[-2:], mode="nearest")
        return [self.smooth_fine(merged), self.smooth_coarse(top)]


class SharedHead(nn.Module):
    """One layer called at two levels: its parameters go only when both calls go."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = conv(3, 4), conv(4, 4, stride=2)
        self.tower = conv(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        return functional.relu(self.tower(fine)), functional.relu(self.tower(coarse))


class SplitConcat(nn.Module):
    """The C2f pattern: split, a growing list of blocks, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 5, 1)
        self.blocks = nn.ModuleList([conv(4), conv(4)])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.blocks)
        return self.leave(torch.cat(parts, 1))


class InPlace(nn.Module):
    """In-place activations and sums, one of them on a value that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = conv(3, 4), nn.ReLU(inplace=True)
        self.one, self.two = conv(4), conv(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.one(self.act(x))
        y += x  # x was overwritten by its activation
        z = self.two(functional.relu(y, inplace=True))
        return z.add_(y)


class Gate(nn.Module):
    """Squeeze and excitation: the gate goes, what it scaled stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = conv(3, 4), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        scale = functional.adaptive_avg_pool2d(x, 1)
        scale = torch.sigmoid(self.excite(functional.relu(self.squeeze(scale))))
        return self.head(x * scale)


class Shuffle(nn.Module):
    """A ShuffleNet unit: the branch goes, the channel shuffle stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), conv(8, 2)
        self.branch = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        joined = torch.cat((left, self.branch(right)), dim=1)
        n, c, h, w = joined.size()
        shuffled = joined.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(shuffled)


class EvenOnly(nn.Module):
    """Down by stride and up again: of one shape at even sizes only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = conv(3, 4), conv(4, 4, stride=2), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(functional.interpolate(self.down(x), scale_factor=2.0))


class Tapped(nn.Module):
    """A block of one shape whose inside is read by the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 4), conv(4, 6), conv(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        inside = self.a(x)
        return self.b(inside), inside


class PreNorm(nn.Module):
    """A transformer's order: norm, layer, sum; and one last norm that serves the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.up, self.down = (
            conv(3, 4),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 4, 1),
        )
        self.last, self.head = nn.BatchNorm2d(4), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.head(self.last(x))


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo.

    Attributes
    ----------
    build : callable
        Makes it.
    regions : frozenset of (str, str)
        Name and kind of every region it has.
    swaps : dict
        Region names whose removal is the same as replacing these modules by others, with what replaces them.
    """

    build: Callable[[], nn.Module]
    regions: frozenset[tuple[str, str]]
    swaps: dict[str, dict[str, Callable[[], nn.Module]]] = field(default_factory=dict)


def bypasses(*names: str) -> frozenset[tuple[str, str]]:
    """Regions of kind bypass."""
    return frozenset((name, "bypass") for name in names)


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _zeros() -> nn.Module:
    """A last layer of a residual branch that adds nothing."""
    return _zeroed(nn.Conv2d(8, 4, 1))


def _zeros_3x3() -> nn.Module:
    return _zeroed(nn.Conv2d(6, 4, 3, padding=1))


ZOO: dict[str, Specimen] = {
    "chain": Specimen(
        Chain,
        bypasses("one", "two"),
        {"one": {"one": nn.Identity, "norm": nn.Identity, "act": nn.Identity}},
    ),
    "residual": Specimen(
        Residual,
        bypasses("a..b") | {("c", "drop"), ("down", "drop")},
        {"a..b": {"b": _zeros_3x3}},
    ),
    "pyramid": Specimen(
        Pyramid,
        bypasses("smooth_fine", "smooth_coarse"),
        {
            "smooth_fine": {"smooth_fine": nn.Identity},
            "smooth_coarse": {"smooth_coarse": nn.Identity},
        },
    ),
    "shared_head": Specimen(SharedHead, bypasses("tower", "tower#2")),
    "split_concat": Specimen(
        SplitConcat,
        bypasses("blocks.0", "blocks.1"),
        {"blocks.0": {"blocks.0": nn.Identity}, "blocks.1": {"blocks.1": nn.Identity}},
    ),
    "in_place": Specimen(InPlace, bypasses("one", "two")),
    "gate": Specimen(Gate, bypasses("squeeze..excite")),
    "shuffle": Specimen(Shuffle, bypasses("branch"), {"branch": {"branch": nn.Identity}}),
    "even_only": Specimen(EvenOnly, frozenset()),
    "tapped": Specimen(Tapped, frozenset()),
    "pre_norm": Specimen(PreNorm, bypasses("up..down"), {"up..down": {"down": _zeros}}),
}


def image_batch(size: tuple[int, int] = (16, 12), images: int = 2) -> Tensor:
    """Images (N, 3, H, W) of random values."""
    return torch.rand(images, 3, *size, generator=torch.Generator().manual_seed(1))


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss for models with any output: mean over the images of a sum that no value drops out of."""
    output = model(batch)
    values = output if isinstance(output, (list, tuple)) else [output]
    return torch.stack([(value.flatten(1).sum(1) + value.flatten(1).square().sum(1)).mean() for value in values]).sum()
