"""What a layer holds, fitted in closed form to what reaches it and to what it should give.

Fits work on sums over places. A layer that is called several times (a head on every level of a pyramid) is fitted anew
at every call, to all calls so far; what follows a call sees the layer as it is by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.operations import is_norm_layer
from fxprune.pairs import channels_last
from fxprune.ranks import summed

RIDGE = 1e-2
"""How strongly fitted weights are held to those that are there, relative to the mean square of what they weigh."""
ROWS = 4
"""Places of the feature maps that a fit looks at, at least, per weight of one output channel."""
MOST, WORK = 65536, 2.5e10
"""Places that it looks at, at most, and products a group that it takes to do so."""
LEAST = 1e-6
"""Share of its mean square below which a channel's variance is nothing to restore a spread from."""
UNALIKE = 0.1
"""Correlation of what a channel gives and what it gave below which its spread is not restored in full."""
WIDEST = 5000
"""Weights of one output channel beyond which a layer is fitted as a scale and shift a channel."""


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
    """

    inputs: list[Tensor] = field(repr=False)
    wanted: list[Tensor] = field(repr=False)
    changed: bool = True
    sums: dict[str, Tensor] = field(repr=False, default_factory=dict)

    def add(self, name: str, value: Tensor) -> Tensor:
        """Add something up over all processes and calls."""
        total = self.sums[name] = summed(value) + self.sums.get(name, 0.0)
        return total


Fit = Callable[[nn.Module, Sight], Callable[[], None] | None]
"""``fit(layer, sight)``: changes the layer's parameters if it knows how; may return what to do when all is done."""


def fit_statistics(layer: nn.Module, sight: Sight) -> Callable[[], None] | None:
    """Give a batch norm the mean and the variance of what reaches it, over all batches: ``heal="norms"``.

    Layers further on see it normalize by these as one batch of all images would; as torch does, what stays in
    `running_var` is the unbiased variance.
    """
    mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) or mean is None or variance is None:
        return None
    origin = sight.sums.setdefault("origin", mean.double())
    rows = [channels_last(value).double() - origin for value in sight.inputs]
    sums = [torch.stack([row.sum(0), row.square().sum(0), row.new_full(mean.shape, len(row))]) for row in rows]
    shift, square, count = sight.add("statistics", torch.stack(sums).sum(0))
    if not sight.changed:
        return None
    shift, square = shift / count, square / count
    mean.copy_((origin + shift).to(mean.dtype))
    variance.copy_(square - shift.square())
    correction = count / (count - 1).clamp_min(1)

    def unbiased() -> None:
        variance.mul_(correction.to(variance.dtype))

    return unbiased


def fit_affine(layer: nn.Module, sight: Sight) -> None:
    """Fit what a layer applies, a matrix or a scale and shift a channel, in closed form: ``"affine"``.

    Convolutions and linear layers get the weights, and the bias if they have one, that come nearest to the outputs of
    the model as it was: ``min |W u - y|^2 + r |W - W_now|^2``, u what now reaches the layer. A linear map of what
    leaves a removed region's place is part of that, folded into the layer that reads it. Least squares give less than
    was there wherever they cannot tell what it was, layer after layer less; so each channel then gets the scale and
    shift by which its mean and variance are what they were (REPAIR, arXiv 2211.08403), and those of norms too.
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if weight is None or not weight.is_floating_point():
        return
    matrix = isinstance(layer, (nn.Conv2d, nn.Linear))
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and weight[0].numel() <= WIDEST:
        moments = _fit_matrix(layer, sight)
        if bias is not None and sight.changed:
            _fit_channels(weight, bias, moments)
    elif bias is not None and (matrix or (weight.ndim == 1 and is_norm_layer(layer))):
        pairs = zip(sight.inputs, sight.wanted, strict=True)
        sums = [_moments(channels_last(layer.forward(x)).double(), channels_last(y).double()) for x, y in pairs]
        moments = sight.add("moments", torch.stack(sums).sum(0))
        if sight.changed:
            sight.sums["moments"] = _fit_channels(weight, bias, moments)


def _fit_channels(weight: Tensor, bias: Tensor, moments: Tensor) -> Tensor:
    """Scale and shift channels by the moments (6, C) of what they give and gave; returns those that they have then."""
    count, x, y, xx, yy, xy = moments
    x, y, xx, yy, xy = x / count, y / count, xx / count, yy / count, xy / count
    now, want = ((square - mean * mean).clamp_min(0).sqrt() for square, mean in ((xx, x), (yy, y)))
    alike = (xy - x * y) / (now * want).clamp_min(1e-30)
    known = now.square() > LEAST * (xx + 1e-30)
    slope = torch.where(known, want / now.clamp_min(1e-30) * (alike / UNALIKE).clamp(0, 1), 1.0)
    shift = y - slope * x
    weight.data.mul_(slope.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1)))
    bias.data.copy_((slope * bias.double() + shift).to(bias.dtype))
    square = slope.square() * xx + 2 * slope * shift * x + shift.square()
    then: Tensor = count * torch.stack([torch.ones_like(x), slope * x + shift, y, square, yy, slope * xy + shift * y])
    return then


def _moments(x: Tensor, y: Tensor) -> Tensor:
    count = torch.full_like(x[0], len(x))
    return torch.stack([count, *(value.sum(0) for value in (x, y, x * x, y * y, x * y))])


def _fit_matrix(layer: nn.Conv2d | nn.Linear, sight: Sight) -> Tensor:
    """Least squares; returns the moments (6, C) of what the layer, with a bias, gives then and of what it gave."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight, bias = layer.weight.data, layer.bias
    outputs, inputs = len(weight) // groups, weight[0].numel()
    places = weight.new_tensor(sum(value.numel() // len(weight) for value in sight.wanted), dtype=torch.float64)
    rows = max(ROWS * inputs, min(MOST, WORK / inputs**2))
    share = min(1.0, rows / float(summed(places)))
    gram = weight.new_zeros(groups, inputs + 1, inputs + 1, dtype=torch.float64)
    cross = weight.new_zeros(groups, inputs + 1, outputs, dtype=torch.float64)
    square = weight.new_zeros(groups, outputs, dtype=torch.float64)
    for u, v in _joined(_samples(layer, sight, share), inputs):
        u = functional.pad(u.reshape(len(u), groups, inputs).transpose(0, 1), (0, 1), value=float(bias is not None))
        v = v.reshape(len(v), groups, outputs).transpose(0, 1)
        gram += (u.transpose(1, 2) @ u).double()
        cross += (u.transpose(1, 2) @ v).double()
        square += v.double().square().sum(1)
    gram, cross, square = (
        sight.add(name, value / share) for name, value in (("gram", gram), ("cross", cross), ("square", square))
    )
    now = functional.pad(weight.reshape(groups, outputs, inputs).double().transpose(1, 2), (0, 0, 0, 1))
    if bias is not None:
        now[:, -1] = bias.data.reshape(groups, outputs).double()
    held = sight.sums.setdefault("held", now)
    if sight.changed:
        mean = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1).clamp_min(1e-12)
        ridge = torch.diag_embed((RIDGE * mean)[:, None].expand(-1, inputs + 1))
        now = torch.linalg.solve(gram + ridge, cross + ridge @ held)
        weight.copy_(now[:, :-1].transpose(1, 2).reshape(weight.shape))
        if bias is not None:
            bias.data.copy_(now[:, -1].reshape(-1))
    given = gram @ now
    sums = (given[:, -1], cross[:, -1], (now * given).sum(1), square, (now * cross).sum(1))
    return torch.stack([value.flatten() for value in (gram[:, -1, -1:].expand(-1, outputs), *sums)])


def _samples(layer: nn.Conv2d | nn.Linear, sight: Sight, share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of what a layer reads at some places of its output, drawn at random, and of what it should give there."""
    for x, y in zip(sight.inputs, sight.wanted, strict=True):
        places = y.numel() // len(layer.weight)
        drawn = torch.rand(places, generator=torch.Generator().manual_seed(0)) < share
        place = drawn.nonzero().flatten().to(x.device)
        if isinstance(layer, nn.Linear):
            yield x.reshape(-1, x.shape[-1])[place], y.reshape(-1, y.shape[-1])[place]
            continue
        reach = [dilation * (size - 1) + 1 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        windows = padded.unfold(2, reach[0], layer.stride[0]).unfold(3, reach[1], layer.stride[1])
        windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]].permute(0, 2, 3, 1, 4, 5)
        height, width = windows.shape[1:3]
        at = (place // (height * width), place // width % height, place % width)
        yield windows[at].flatten(1), y.permute(0, 2, 3, 1)[at]


def _joined(parts: Iterable[tuple[Tensor, Tensor]], least: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Join parts to at least so many rows: products of fewer cost more to add up than to make."""
    kept: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        kept.append(part)
        if sum(len(u) for u, _ in kept) >= least:
            yield torch.cat([u for u, _ in kept]), torch.cat([v for _, v in kept])
            kept.clear()
    if kept:
        yield torch.cat([u for u, _ in kept]), torch.cat([v for _, v in kept])
