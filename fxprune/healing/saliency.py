"""Where in what a layer gives a deviation matters: saliency maps, the size of the loss's gradient place by place.

Most places of a detector's feature maps are background, and what they give is of little consequence. A fit, or an
imitation, that minds all places alike spends most of what it can do on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.calls import batch_loss
from fxprune.adapters.protocol import Batch
from fxprune.graph.fx_utils import is_within
from fxprune.graph.operators import channel_dim
from fxprune.healing.teacher_student import TeacherStudent, forward_hooks, without_gradients
from fxprune.runtime.torch_internals import owns_tensors, tree_flatten, tree_unflatten

MIN_WEIGHT = 0.1
"""Weight that every place has, of the 1 that all have on average: a gradient of zero is no license to give anything."""

Maps = Mapping[tuple[str, int], Sequence[Tensor | None]]
"""Weights of places by module and call, one tensor (N, H, W) or (N, L) for each that the module gave; None: unknown."""


def saliency_maps(pair: TeacherStudent, batch: Batch, index: int = 0, seed: int = 0) -> Maps:
    """Weigh the places of the original's features: the root of the mean square of the loss's gradient over channels.

    The loss is that of the model's own confident outputs; each image's weights average to 1 in every map.

    Parameters
    ----------
    pair : Pair
    batch : Batch
        As the adapter runs it, without labels.
    index, seed : int
        The batch's number for errors, and of what samples inside the loss.

    Returns
    -------
    dict
        Of layers that hold weights and of the captured parts. What the loss does not depend on is not in it.

    Raises
    ------
    LossError, BatchError
        If the loss cannot be taken.

    Examples
    --------
    >>> maps = saliency_maps(pair, batch)            # doctest: +SKIP
    >>> maps["backbone.conv1", 1][0].shape           # doctest: +SKIP
    torch.Size([8, 80, 80])
    """
    model, adapter = pair.teacher, pair.adapter
    labelled = adapter.label(model, batch)
    calls: Counter[str] = Counter()
    found: dict[tuple[str, int], list[Tensor | None]] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls[name] += 1
        leaves, form = tree_flatten(output)
        maps = found[name, calls[name]] = list[Tensor | None]()
        for position, value in enumerate(leaves):
            if isinstance(value, Tensor) and value.is_floating_point():
                if not value.requires_grad:
                    value = leaves[position] = value.detach().requires_grad_(True).clone()
                if value.requires_grad:
                    channels = channel_dim(module, value)
                    value.register_hook(partial(_store_weights, maps, len(maps), channels, batch.count))  # type: ignore[no-untyped-call]
                maps.append(None)
        return tree_unflatten(leaves, form)

    inside = [(name, module) for name, module in model.named_modules() if is_within(name, pair.graphs)]
    names = [name for name, module in inside if name in pair.graphs or owns_tensors(module)]
    with forward_hooks(model, names, see), without_gradients(model), torch.enable_grad():
        loss = batch_loss(model, adapter, labelled, index, seed).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    return {point: maps for point, maps in found.items() if any(value is not None for value in maps)}


def _store_weights(maps: list[Tensor | None], position: int, channels: int, images: int, slope: Tensor) -> None:
    """Turn a gradient into weights, kept on the CPU and in half as many bits: there are as many maps as layers."""
    if slope.ndim < 3 or not bool(slope.isfinite().all()):
        return  # one place an image, or proposals, which are others when the loss is taken; or no number
    size = slope.float().square().mean(channels).sqrt()
    each = size.reshape(images if len(size) % images == 0 else 1, -1)
    mean = each.mean(1, keepdim=True)
    weights = torch.where(mean > 0, MIN_WEIGHT + (1 - MIN_WEIGHT) * each / mean.clamp_min(1e-30), 1.0)
    maps[position] = weights.reshape(size.shape).bfloat16().cpu()


def flip_maps(weights: Tensor, mirrored: Tensor) -> Tensor:
    """Maps of images some of which are mirrored; where places have no columns, those of the mirrored ones are all 1."""
    if weights.ndim == 3:
        return torch.where(mirrored[:, None, None], weights.flip(-1), weights)
    return torch.where(mirrored.reshape(-1, *[1] * (weights.ndim - 1)), torch.ones_like(weights), weights)
