"""Fits the parameters of one layer in closed form to its inputs and target outputs.

Fits use sums over random positions of the layer's output. A layer that is called several times (a head on every level
of a pyramid) is fitted again at every call, to all calls so far. The layers after a call read the output of that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.attribution.linear_recovery import solve_positive_definite
from fxprune.graph.operators import is_norm_layer, to_rows
from fxprune.runtime.distributed import all_gather, all_reduce_sum
from fxprune.runtime.torch_internals import convolution_padding, layer_methods

QUICK_EFFORT = 0.5
"""`effort` of `fit_layer` in the trials of a search."""
RELATIVE_RIDGE = 1e-2
"""Ridge penalty on the change of the weights, relative to the mean square of the layer's inputs."""
ROWS_PER_WEIGHT = 4
"""Least number of positions of a fit, per weight of one output channel."""
MAX_ROWS, MAX_PRODUCTS = 65536, 2.5e10
"""Largest number of positions of a fit, and of products per group. `ROWS_PER_WEIGHT` has priority."""
MIN_RELATIVE_VARIANCE = 1e-6
"""Variance of a channel, relative to its mean square, below which the channel is not rescaled."""
MIN_CORRELATION = 0.1
"""Correlation of outputs and targets of a channel below which its standard deviation is not fully restored."""
MAX_PRIMAL_INPUTS = 5000
"""Number of weights of one output channel above which least squares are solved in the dual form, by rows."""
MAX_DUAL_ROWS = 6144
"""About the largest number of rows per call in the dual form, over all processes."""


@dataclass(frozen=True)
class LayerRows:
    """Inputs and targets at one call of a layer, one tensor per calibration batch.

    Attributes
    ----------
    inputs : list of Tensor
        Inputs of the layer in the pruned model.
    targets : list of Tensor
        Target outputs: those of the original on the same images, see `fxprune.healing.reconstruction.layerwise`.
    changed : bool
        Whether outputs differ from targets, at this call or an earlier one. If not, the fit must not change the layer.
    sums : dict of str to Tensor
        Sums of the fit over all calls of the layer so far, including those before it changed.
    saliency : list of Tensor, optional
        Weights of the positions of the outputs, see `fxprune.healing.saliency`. Without them, all weights are equal.
    """

    inputs: list[Tensor] = field(repr=False)
    targets: list[Tensor] = field(repr=False)
    changed: bool = True
    sums: dict[str, Tensor] = field(repr=False, default_factory=dict)
    saliency: list[Tensor] | None = field(repr=False, default=None)

    def row_weights(self) -> list[Tensor]:
        """Return the weights of the positions (n, 1) per batch; scalars of 1 without saliency."""
        if self.saliency is None:
            return [value.new_ones(()) for value in self.targets]
        return [maps.to(value).reshape(-1, 1) for maps, value in zip(self.saliency, self.targets, strict=True)]

    def accumulate(self, name: str, value: Tensor) -> Tensor:
        """Add a value, summed over all processes, to the sum `name`. Returns the sum over all calls so far."""
        total = self.sums[name] = all_reduce_sum(value) + self.sums.get(name, 0.0)
        return total


def row_share(layer: nn.Conv2d | nn.Linear, data: LayerRows, rows: float) -> float:
    """Return `rows` as a share of the positions of all processes, at most 1."""
    positions = sum(value.numel() // len(layer.weight) for value in data.targets)
    return min(1.0, rows / float(all_reduce_sum(layer.weight.new_tensor(positions, dtype=torch.float64))))


def draw_rows(layer: nn.Conv2d | nn.Linear, data: LayerRows, share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs (groups, n, C + 1) and targets (groups, n, D) at random positions, per batch.

    Both are multiplied by the root of the saliency. The last input is 1 if the layer has a bias, otherwise 0.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    for x, y, weights in zip(data.inputs, data.targets, data.row_weights(), strict=True):
        count = y.numel() // len(layer.weight)
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(0)) < share
        positions = drawn.nonzero().flatten().to(x.device)
        if isinstance(layer, nn.Linear):
            u, v = x.reshape(-1, x.shape[-1])[positions], y.reshape(-1, y.shape[-1])[positions]
        else:
            u, v = input_patches(layer, x, positions), y.movedim(1, -1).flatten(0, 2)[positions]
        u, v = (rows.reshape(len(rows), groups, -1).transpose(0, 1) for rows in (u, v))
        root = (weights[positions] if weights.ndim else weights).sqrt()
        yield functional.pad(u, (0, 1), value=float(layer.bias is not None)) * root, v * root


def input_patches(layer: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Return the input patches (n, C) of a convolution at flat indices (n,) of its output positions."""
    reach = [dilation * (size - 1) + 1 for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, convolution_padding(layer), mode=mode)
    windows = padded.unfold(2, reach[0], layer.stride[0]).unfold(3, reach[1], layer.stride[1])
    windows = windows[..., :: layer.dilation[0], :: layer.dilation[1]].permute(0, 2, 3, 1, 4, 5)
    height, width = windows.shape[1:3]
    return windows[positions // (height * width), positions // width % height, positions % width].flatten(1)


def merge_small_parts(parts: Iterable[tuple[Tensor, Tensor]], least: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Concatenate parts to at least `least` rows: with fewer, summing the products takes longer than computing them."""
    kept: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        kept.append(part)
        if sum(u.shape[1] for u, _ in kept) >= least:
            yield torch.cat([u for u, _ in kept], 1), torch.cat([v for _, v in kept], 1)
            kept.clear()
    if kept:
        yield torch.cat([u for u, _ in kept], 1), torch.cat([v for _, v in kept], 1)


Fit = Callable[[nn.Module, LayerRows], None]
"""``fit(layer, data)``: changes the layer's parameters if the fit supports this layer."""


def fit_layer(layer: nn.Module, data: LayerRows, effort: float = 1.0) -> None:
    """Fit the weights of a layer in closed form: the fit of ``heal="affine"``.

    Convolutions and linear layers get the weights W, and the bias if they have one, of a ridge regression:
    ``min sum s |W u - y|^2 + r |W - W_now|^2``, with input u, target y and saliency s at each position. So the layer
    behind a removed region absorbs the best linear map of the stand-in. Outputs of least squares have less variance
    than the targets, and the loss of variance adds up from layer to layer. Therefore channels, also those of norms, are
    then scaled and shifted to the mean and variance of the targets (REPAIR, arXiv 2211.08403).

    Parameters
    ----------
    layer : Module
        Layers other than plain ``Conv2d``, ``Linear`` and affine norms are not changed.
    data : LayerRows
    effort : float
        Number of positions to use, relative to the default number.

    Examples
    --------
    >>> fit_layer(layer, LayerRows([x], [original_layer(original_x)]))   # doctest: +SKIP
    """
    own: dict[str, Tensor] = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    weight, bias = own.get("weight"), getattr(layer, "bias", None)
    if weight is None or not weight.is_floating_point() or not _is_plain_layer(layer):
        return
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        (_fit_normal_equations if weight[0].numel() <= MAX_PRIMAL_INPUTS else _fit_dual)(layer, data, effort)
    elif bias is not None and weight.ndim == 1 and is_norm_layer(layer):
        parts = zip(data.inputs, data.targets, data.row_weights(), strict=True)
        sums = [_moments(to_rows(layer, layer.forward(x)).double(), to_rows(layer, y).double(), s) for x, y, s in parts]
        moments = data.accumulate("moments", torch.stack(sums).sum(0))
        if data.changed:
            data.sums["moments"] = _match_moments(weight, bias, moments)


def _is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer has the methods of torch's class. Subclasses may also pad, standardize or apply activations."""
    homes = {getattr(method, "__module__", "") for method in layer_methods(layer)}
    return all(f"{home}.".startswith(("torch.nn.modules.", "torchvision.ops.misc.")) for home in homes)


def _match_moments(weight: Tensor, bias: Tensor, moments: Tensor) -> Tensor:
    """Scale and shift channels so that mean and variance of the outputs become those of the targets.

    `moments` (6, C) are the sums of 1, x, y, x^2, y^2 and x y, for outputs x and targets y. Returns the new moments.
    """
    count, x, y, xx, yy, xy = moments
    x, y, xx, yy, xy = x / count, y / count, xx / count, yy / count, xy / count
    x_std, y_std = ((square - mean * mean).clamp_min(0).sqrt() for square, mean in ((xx, x), (yy, y)))
    correlation = (xy - x * y) / (x_std * y_std).clamp_min(1e-30)
    varies = x_std.square() > MIN_RELATIVE_VARIANCE * (xx + 1e-30)
    scale = torch.where(varies, y_std / x_std.clamp_min(1e-30) * (correlation / MIN_CORRELATION).clamp(0, 1), 1.0)
    shift = y - scale * x
    weight.data.mul_(scale.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1)))
    bias.data.copy_((scale * bias.double() + shift).to(bias.dtype))
    square = scale.square() * xx + 2 * scale * shift * x + shift.square()
    new: Tensor = count * torch.stack([torch.ones_like(x), scale * x + shift, y, square, yy, scale * xy + shift * y])
    return new


def _moments(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sums (6, C) that `_match_moments` takes, of rows (n, C)."""
    return torch.stack([(value * weights).sum(0) for value in (torch.ones_like(x), x, y, x * x, y * y, x * y)])


def _fit_normal_equations(layer: nn.Conv2d | nn.Linear, data: LayerRows, effort: float) -> None:
    """Fit a layer by the normal equations; with a bias, then match the mean and variance of its channels."""
    initial, bias = data.sums.setdefault("initial", _get_matrix(layer)), layer.bias
    groups, inputs, outputs = len(initial), initial.shape[1] - 1, initial.shape[2]
    share = row_share(layer, data, effort * max(ROWS_PER_WEIGHT * inputs, min(MAX_ROWS, MAX_PRODUCTS / inputs**2)))
    parts = list(merge_small_parts(draw_rows(layer, data, share), inputs))
    origin = None if bias is None else _find_origin(parts, initial, data)
    gram = initial.new_zeros(groups, inputs + 1, inputs + 1)
    cross, square = torch.zeros_like(initial), initial.new_zeros(groups, outputs)
    for u, v in parts:
        if origin is not None:
            one = u[:, :, -1:]
            u, v = (rows - one * mean[:, None].to(rows.dtype) for rows, mean in zip((u, v), origin, strict=True))
        gram += (u.transpose(1, 2) @ u).double()
        cross += (u.transpose(1, 2) @ v).double()
        square += v.double().square().sum(1)
    sums = (("gram", gram), ("cross", cross), ("square", square))
    gram, cross, square = (data.accumulate(name, value / share) for name, value in sums)
    if not data.changed:
        return
    if origin is not None:
        gram, cross, square = _shift_moments(gram, cross, square, origin)
    mean = gram.diagonal(dim1=1, dim2=2)[:, :-1].mean(1).clamp_min(1e-12)
    ridge = RELATIVE_RIDGE * mean[:, None]
    penalized = gram.clone()
    penalized.diagonal(dim1=1, dim2=2).add_(ridge)
    fitted = solve_positive_definite(penalized, cross + ridge[:, None] * initial)
    _set_matrix(layer, fitted)
    if bias is not None:
        product, count = gram @ fitted, gram[:, -1, -1:].expand(-1, outputs)
        moments = (count, product[:, -1], cross[:, -1], (fitted * product).sum(1), square, (fitted * cross).sum(1))
        _match_moments(layer.weight, bias, torch.stack([value.flatten() for value in moments]))


def _find_origin(parts: Sequence[tuple[Tensor, Tensor]], like: Tensor, data: LayerRows) -> tuple[Tensor, Tensor]:
    """Return the mean input and target of a layer with a bias, at its first call. Products are taken about them.

    If values are far from zero, float32 products about zero are too coarse to resolve a small variance.
    """
    ones = like.shape[1] - 1
    if "origin" not in data.sums:
        sums = like.new_zeros(len(like), like.shape[1] + like.shape[2])
        for u, v in parts:
            sums += torch.cat([u.double().sum(1), v.double().sum(1)], 1)
        sums = all_reduce_sum(sums)
        data.sums["origin"] = sums / sums[:, ones : ones + 1].clamp_min(1.0)
        data.sums["origin"][:, ones] = 0.0
    origin = data.sums["origin"]
    return origin[:, : ones + 1], origin[:, ones + 1 :]


def _shift_moments(
    gram: Tensor, cross: Tensor, square: Tensor, origin: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert sums of products about an origin to sums about zero. The last input is 1 at every position."""
    u, v = origin
    once, total, count = gram[:, :, -1:], cross[:, -1:], gram[:, -1:, -1:]
    u, v = u[:, :, None], v[:, None]
    return (
        gram + u @ once.transpose(1, 2) + once @ u.transpose(1, 2) + count * (u @ u.transpose(1, 2)),
        cross + u @ total + once @ v + count * (u @ v),
        square + (2 * v * total + count * v.square())[:, 0],
    )


def _fit_dual(layer: nn.Conv2d | nn.Linear, data: LayerRows, effort: float) -> None:
    """Solve the same least squares for fewer rows than weights: ``W_now + (y - W_now u)(u^T u + r)^-1 u^T``."""
    initial = data.sums.setdefault("initial", _get_matrix(layer))
    shares = all_gather(list(draw_rows(layer, data, row_share(layer, data, effort * MAX_DUAL_ROWS))))
    parts = [part for turn in zip_longest(*shares) for part in turn if part is not None]  # order of one process
    for index, name in enumerate(("u", "v")):
        earlier = [data.sums[name]] if name in data.sums else []
        data.sums[name] = torch.cat([*earlier, *(part[index] for part in parts)], 1)
    if data.changed:
        u, v = (data.sums[name] for name in ("u", "v"))
        kernel = (u @ u.transpose(1, 2)).double()
        ridge = RELATIVE_RIDGE * kernel.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-12) / (u.shape[2] - 1)
        kernel.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        step = u.transpose(1, 2) @ solve_positive_definite(kernel, (v - u @ initial.to(u.dtype)).double()).to(u.dtype)
        _set_matrix(layer, initial + step.double())


def _get_matrix(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Return weights and bias of a layer as a matrix (groups, inputs + 1, outputs). The last row is the bias, or 0."""
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
