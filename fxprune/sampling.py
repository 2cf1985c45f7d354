"""What a layer reads, and should give, at places of its output that are drawn at random: the rows of a fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.ranks import summed


@dataclass(frozen=True)
class Sight:
    """What the runs have at one call of a layer: a value a calibration batch.

    Attributes
    ----------
    inputs : list of Tensor
        What the layer is given in the pruned model.
    wanted : list of Tensor
        What it gave in the model as it was, on the same images.
    changed : bool
        Whether it gives something else now, here or at an earlier call. If not it is to be left as it is.
    sums : dict of str to Tensor
        What a fit has added up over the layer's calls so far, those before it changed too.
    saliency : list of Tensor, optional
        How much each place of the outputs counts (see `fxprune.saliency`); without it all count alike.
    """

    inputs: list[Tensor] = field(repr=False)
    wanted: list[Tensor] = field(repr=False)
    changed: bool = True
    sums: dict[str, Tensor] = field(repr=False, default_factory=dict)
    saliency: list[Tensor] | None = field(repr=False, default=None)

    def weights(self) -> list[Tensor]:
        """How much each place counts, one row (n, 1) a place."""
        if self.saliency is None:
            return [value.new_ones(()) for value in self.wanted]
        return [maps.to(value).reshape(-1, 1) for maps, value in zip(self.saliency, self.wanted, strict=True)]

    def add(self, name: str, value: Tensor) -> Tensor:
        """Add something up over all processes and calls."""
        total = self.sums[name] = summed(value) + self.sums.get(name, 0.0)
        return total


def share_of(layer: nn.Conv2d | nn.Linear, sight: Sight, rows: float) -> float:
    """Share of the places that so many rows are, all processes together."""
    places = sum(value.numel() // len(layer.weight) for value in sight.wanted)
    return min(1.0, rows / float(summed(layer.weight.new_tensor(places, dtype=torch.float64))))


def samples(layer: nn.Conv2d | nn.Linear, sight: Sight, share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (groups, n, C) that a layer reads at places drawn at random and should give, times the root of saliency."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    for x, y, weights in zip(sight.inputs, sight.wanted, sight.weights(), strict=True):
        places = y.numel() // len(layer.weight)
        drawn = torch.rand(places, generator=torch.Generator().manual_seed(0)) < share
        place = drawn.nonzero().flatten().to(x.device)
        if isinstance(layer, nn.Linear):
            u, v = x.reshape(-1, x.shape[-1])[place], y.reshape(-1, y.shape[-1])[place]
        else:
            u, v = windows(layer, x, place), y.movedim(1, -1).flatten(0, 2)[place]
        u, v = (rows.reshape(len(rows), groups, -1).transpose(0, 1) for rows in (u, v))
        root = (weights[place] if weights.ndim else weights).sqrt()
        yield functional.pad(u, (0, 1), value=float(layer.bias is not None)) * root, v * root


def windows(layer: nn.Conv2d, x: Tensor, place: Tensor) -> Tensor:
    """What a convolution reads (n, C) at places of its output."""
    reach = [dilation * (size - 1) + 1 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    windows = padded.unfold(2, reach[0], layer.stride[0]).unfold(3, reach[1], layer.stride[1])
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]].permute(0, 2, 3, 1, 4, 5)
    height, width = windows.shape[1:3]
    return windows[place // (height * width), place // width % height, place % width].flatten(1)


def joined(parts: Iterable[tuple[Tensor, Tensor]], least: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Join parts to at least so many rows: products of fewer cost more to add up than to make."""
    kept: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        kept.append(part)
        if sum(u.shape[1] for u, _ in kept) >= least:
            yield torch.cat([u for u, _ in kept], 1), torch.cat([v for _, v in kept], 1)
            kept.clear()
    if kept:
        yield torch.cat([u for u, _ in kept], 1), torch.cat([v for _, v in kept], 1)
