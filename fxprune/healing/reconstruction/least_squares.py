"""What a layer holds, fitted in closed form to what reaches it and to what it should give.

Fits work on sums over places of the layer's output, drawn at random. A layer that is called several times (a head on
every level of a pyramid) is fitted anew at every call, to all calls so far; what follows a call sees the layer as it is
by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.graph.operators import is_norm_layer, to_rows
from fxprune.runtime.distributed import all_gather, all_reduce_sum
from fxprune.runtime.linear_solver import solve_positive_definite
from fxprune.runtime.torch_internals import convolution_padding, layer_methods

QUICK_EFFORT = 0.5
"""Share of the usual effort that is enough where a fit only serves to judge a plan by."""
RELATIVE_RIDGE = 1e-2
"""How strongly fitted weights are held to those that are there, relative to the mean square of what they weigh."""
ROWS_PER_WEIGHT = 4
"""Places of the feature maps that a fit looks at, at least, per weight of one output channel."""
MAX_ROWS, MAX_PRODUCTS = 65536, 2.5e10
"""Places that it looks at, at most, and products a group that it takes to do so."""
MIN_RELATIVE_VARIANCE = 1e-6
"""Share of its mean square below which a channel's variance is nothing to restore a spread from."""
MIN_CORRELATION = 0.1
"""Correlation of what a channel gives and what it gave below which its spread is not restored in full."""
MAX_PRIMAL_INPUTS = 5000
"""Weights of one output channel beyond which least squares are solved by rows, not by weights."""
MAX_DUAL_ROWS = 6144
"""About so many rows are looked at then, at most, at each call; of all processes together."""


@dataclass(frozen=True)
class LayerRows:
    """What the runs have at one call of a layer: a value a calibration batch.

    Attributes
    ----------
    inputs : list of Tensor
        What the layer is given in the pruned model.
    targets : list of Tensor
        What it gave in the model as it was, on the same images.
    changed : bool
        Whether it gives something else now, here or at an earlier call. If not it is to be left as it is.
    sums : dict of str to Tensor
        What a fit has added up over the layer's calls so far, those before it changed too.
    saliency : list of Tensor, optional
        How much each place of the outputs counts (see `fxprune.healing.saliency`); without it all count alike.
    """

    inputs: list[Tensor] = field(repr=False)
    targets: list[Tensor] = field(repr=False)
    changed: bool = True
    sums: dict[str, Tensor] = field(repr=False, default_factory=dict)
    saliency: list[Tensor] | None = field(repr=False, default=None)

    def row_weights(self) -> list[Tensor]:
        """How much each place counts, one row (n, 1) a place."""
        if self.saliency is None:
            return [value.new_ones(()) for value in self.targets]
        return [maps.to(value).reshape(-1, 1) for maps, value in zip(self.saliency, self.targets, strict=True)]

    def accumulate(self, name: str, value: Tensor) -> Tensor:
        """Add something up over all processes and calls."""
        total = self.sums[name] = all_reduce_sum(value) + self.sums.get(name, 0.0)
        return total


def row_share(layer: nn.Conv2d | nn.Linear, sight: LayerRows, rows: float) -> float:
    """Share of the places that so many rows are, all processes together."""
    places = sum(value.numel() // len(layer.weight) for value in sight.targets)
    return min(1.0, rows / float(all_reduce_sum(layer.weight.new_tensor(places, dtype=torch.float64))))


def draw_rows(layer: nn.Conv2d | nn.Linear, sight: LayerRows, share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (groups, n, C) that a layer reads at places drawn at random and should give, times the root of saliency."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    for x, y, weights in zip(sight.inputs, sight.targets, sight.row_weights(), strict=True):
        places = y.numel() // len(layer.weight)
        drawn = torch.rand(places, generator=torch.Generator().manual_seed(0)) < share
        place = drawn.nonzero().flatten().to(x.device)
        if isinstance(layer, nn.Linear):
            u, v = x.reshape(-1, x.shape[-1])[place], y.reshape(-1, y.shape[-1])[place]
        else:
            u, v = input_patches(layer, x, place), y.movedim(1, -1).flatten(0, 2)[place]
        u, v = (rows.reshape(len(rows), groups, -1).transpose(0, 1) for rows in (u, v))
        root = (weights[place] if weights.ndim else weights).sqrt()
        yield functional.pad(u, (0, 1), value=float(layer.bias is not None)) * root, v * root


def input_patches(layer: nn.Conv2d, x: Tensor, place: Tensor) -> Tensor:
    """What a convolution reads (n, C) at places of its output."""
    reach = [dilation * (size - 1) + 1 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, convolution_padding(layer), mode=mode)
    windows = padded.unfold(2, reach[0], layer.stride[0]).unfold(3, reach[1], layer.stride[1])
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]].permute(0, 2, 3, 1, 4, 5)
    height, width = windows.shape[1:3]
    return windows[place // (height * width), place // width % height, place % width].flatten(1)


def merge_small_parts(parts: Iterable[tuple[Tensor, Tensor]], least: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Join parts to at least so many rows: products of fewer cost more to add up than to make."""
    kept: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        kept.append(part)
        if sum(u.shape[1] for u, _ in kept) >= least:
            yield torch.cat([u for u, _ in kept], 1), torch.cat([v for _, v in kept], 1)
            kept.clear()
    if kept:
        yield torch.cat([u for u, _ in kept], 1), torch.cat([v for _, v in kept], 1)


Fit = Callable[[nn.Module, LayerRows], None]
"""``fit(layer, sight)``: changes the layer's parameters if it knows how."""


def fit_layer(layer: nn.Module, sight: LayerRows, effort: float = 1.0) -> None:
    """Fit what a layer applies, a matrix or a scale and shift a channel, in closed form: ``"affine"``.

    Convolutions and linear layers get the weights, and the bias if they have one, that come nearest to the outputs of
    the model as it was: ``min s |W u - y|^2 + r |W - W_now|^2``, u what now reaches the layer, s the saliency of the
    place. A linear map of what leaves a removed region's place is part of that, folded into the layer that reads it.
    Least squares give less than was there wherever they cannot tell what it was, layer after layer less; so channels
    then get the scale and shift by which mean and variance are what they were (REPAIR, arXiv 2211.08403); norms too.
    `effort` is the share of the places that they usually look at.
    """
    own: dict[str, Tensor] = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    weight, bias = own.get("weight"), getattr(layer, "bias", None)
    if weight is None or not weight.is_floating_point() or not _is_plain_layer(layer):
        return
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        (_fit_normal_equations if weight[0].numel() <= MAX_PRIMAL_INPUTS else _fit_dual)(layer, sight, effort)
    elif bias is not None and weight.ndim == 1 and is_norm_layer(layer):
        parts = zip(sight.inputs, sight.targets, sight.row_weights(), strict=True)
        sums = [_moments(to_rows(layer, layer.forward(x)).double(), to_rows(layer, y).double(), s) for x, y, s in parts]
        moments = sight.accumulate("moments", torch.stack(sums).sum(0))
        if sight.changed:
            sight.sums["moments"] = _match_moments(weight, bias, moments)


def _is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer computes as its kind does: a class derived from it may pad, standardize or activate besides."""
    homes = {getattr(method, "__module__", "") for method in layer_methods(layer)}
    return all(f"{home}.".startswith(("torch.nn.modules.", "torchvision.ops.misc.")) for home in homes)


def _match_moments(weight: Tensor, bias: Tensor, moments: Tensor) -> Tensor:
    """Scale and shift channels by the moments (6, C) of what they give and gave; returns those that they have then."""
    count, x, y, xx, yy, xy = moments
    x, y, xx, yy, xy = x / count, y / count, xx / count, yy / count, xy / count
    now, want = ((square - mean * mean).clamp_min(0).sqrt() for square, mean in ((xx, x), (yy, y)))
    alike = (xy - x * y) / (now * want).clamp_min(1e-30)
    known = now.square() > MIN_RELATIVE_VARIANCE * (xx + 1e-30)
    slope = torch.where(known, want / now.clamp_min(1e-30) * (alike / MIN_CORRELATION).clamp(0, 1), 1.0)
    shift = y - slope * x
    weight.data.mul_(slope.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1)))
    bias.data.copy_((slope * bias.double() + shift).to(bias.dtype))
    square = slope.square() * xx + 2 * slope * shift * x + shift.square()
    then: Tensor = count * torch.stack([torch.ones_like(x), slope * x + shift, y, square, yy, slope * xy + shift * y])
    return then


def _moments(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([(value * weights).sum(0) for value in (torch.ones_like(x), x, y, x * x, y * y, x * y)])


def _fit_normal_equations(layer: nn.Conv2d | nn.Linear, sight: LayerRows, effort: float) -> None:
    """Least squares; then channels that have a bias get the mean and the spread there were."""
    now, bias = sight.sums.setdefault("held", _get_matrix(layer)), layer.bias
    groups, inputs, outputs = len(now), now.shape[1] - 1, now.shape[2]
    share = row_share(layer, sight, effort * max(ROWS_PER_WEIGHT * inputs, min(MAX_ROWS, MAX_PRODUCTS / inputs**2)))
    parts = list(merge_small_parts(draw_rows(layer, sight, share), inputs))
    origin = None if bias is None else _find_origin(parts, now, sight)
    gram = now.new_zeros(groups, inputs + 1, inputs + 1)
    cross, square = torch.zeros_like(now), now.new_zeros(groups, outputs)
    for u, v in parts:
        if origin is not None:
            one = u[:, :, -1:]
            u, v = (rows - one * middle[:, None].to(rows.dtype) for rows, middle in zip((u, v), origin, strict=True))
        gram += (u.transpose(1, 2) @ u).double()
        cross += (u.transpose(1, 2) @ v).double()
        square += v.double().square().sum(1)
    sums = (("gram", gram), ("cross", cross), ("square", square))
    gram, cross, square = (sight.accumulate(name, value / share) for name, value in sums)
    if not sight.changed:
        return
    if origin is not None:
        gram, cross, square = _shift_moments(gram, cross, square, origin)
    mean = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1).clamp_min(1e-12)
    ridge = RELATIVE_RIDGE * mean[:, None]
    held = gram.clone()
    held.diagonal(dim1=1, dim2=2).add_(ridge)
    now = solve_positive_definite(held, cross + ridge[:, None] * now)
    _set_matrix(layer, now)
    if bias is not None:
        given, count = gram @ now, gram[:, -1, -1:].expand(-1, outputs)
        moments = (count, given[:, -1], cross[:, -1], (now * given).sum(1), square, (now * cross).sum(1))
        _match_moments(layer.weight, bias, torch.stack([value.flatten() for value in moments]))


def _find_origin(parts: Sequence[tuple[Tensor, Tensor]], like: Tensor, sight: LayerRows) -> tuple[Tensor, Tensor]:
    """Where a layer with a bias has the middle of what it reads and should give, at its first call.

    Products of what is far from zero would be too coarse in float32 to tell a small spread by.
    """
    ones = like.shape[1] - 1
    if "middle" not in sight.sums:
        sums = like.new_zeros(len(like), like.shape[1] + like.shape[2])
        for u, v in parts:
            sums += torch.cat([u.double().sum(1), v.double().sum(1)], 1)
        sums = all_reduce_sum(sums)
        sight.sums["middle"] = sums / sums[:, ones : ones + 1].clamp_min(1.0)
        sight.sums["middle"][:, ones] = 0.0
    middle = sight.sums["middle"]
    return middle[:, : ones + 1], middle[:, ones + 1 :]


def _shift_moments(
    gram: Tensor, cross: Tensor, square: Tensor, origin: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of products about an origin as they are about zero; the last of what is read is one for each place."""
    u, v = origin
    once, total, count = gram[:, :, -1:], cross[:, -1:], gram[:, -1:, -1:]
    u, v = u[:, :, None], v[:, None]
    return (
        gram + u @ once.transpose(1, 2) + once @ u.transpose(1, 2) + count * (u @ u.transpose(1, 2)),
        cross + u @ total + once @ v + count * (u @ v),
        square + (2 * v * total + count * v.square())[:, 0],
    )


def _fit_dual(layer: nn.Conv2d | nn.Linear, sight: LayerRows, effort: float) -> None:
    """The same least squares where rows are fewer than weights: ``W_now + (y - W_now u)(u^T u + r)^-1 u^T``."""
    held = sight.sums.setdefault("held", _get_matrix(layer))
    shares = all_gather(list(draw_rows(layer, sight, row_share(layer, sight, effort * MAX_DUAL_ROWS))))
    parts = [part for turn in zip_longest(*shares) for part in turn if part is not None]  # as one process has them
    for place, name in enumerate(("u", "v")):
        earlier = [sight.sums[name]] if name in sight.sums else []
        sight.sums[name] = torch.cat([*earlier, *(part[place] for part in parts)], 1)
    if sight.changed:
        u, v = (sight.sums[name] for name in ("u", "v"))
        kernel = (u @ u.transpose(1, 2)).double()
        ridge = RELATIVE_RIDGE * kernel.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-12) / (u.shape[2] - 1)
        kernel.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        step = u.transpose(1, 2) @ solve_positive_definite(kernel, (v - u @ held.to(u.dtype)).double()).to(u.dtype)
        _set_matrix(layer, held + step.double())


def _get_matrix(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """What a layer applies (groups, inputs + 1, outputs), the last input being 1 for the bias, or else 0."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weight = layer.weight.detach().double().reshape(groups, len(layer.weight) // groups, -1).transpose(1, 2)
    matrix = functional.pad(weight, (0, 0, 0, 1))
    if layer.bias is not None:
        matrix[:, -1] = layer.bias.detach().double().reshape(groups, -1)
    return matrix


def _set_matrix(layer: nn.Conv2d | nn.Linear, matrix: Tensor) -> None:
    layer.weight.data.copy_(matrix[:, :-1].transpose(1, 2).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.data.copy_(matrix[:, -1].reshape(-1))
