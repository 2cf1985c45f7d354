"""Computes saliency maps: the size of the loss's gradient at each position of a layer's output.

Most positions of a detector's feature maps are background and hardly influence the loss. Without weights, a fit or a
training would spend most of the capacity of the layers on them.
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
from fxprune.healing.teacher_student import TeacherStudent, forward_hooks
from fxprune.runtime.private_copy import weights_require_gradients
from fxprune.runtime.torch_internals import owns_tensors, tree_flatten, tree_unflatten

MIN_WEIGHT = 0.1
"""Smallest weight of a position; the mean is 1. Outputs at positions with zero gradient must not become arbitrary."""

Maps = Mapping[tuple[str, int], Sequence[Tensor | None]]
"""Weights of positions by module and call: one (N, H, W) or (N, L) per output tensor, None if it is not known."""


def saliency_maps(pair: TeacherStudent, batch: Batch, index: int = 0, seed: int = 0) -> Maps:
    """Return the weights of the positions of the original's features.

    A weight is the root mean square, over channels, of the loss's gradient. The targets are the model's own confident
    outputs. In every map, the weights of each image have mean 1.

    Parameters
    ----------
    pair : TeacherStudent
    batch : Batch
        Normalized by the adapter, without labels.
    index, seed : int
        Number of the batch in error messages, and seed of random sampling inside the loss.

    Returns
    -------
    Maps
        For layers with weights and for islands. Outputs that the loss does not depend on have no entry.

    Raises
    ------
    LossError, BatchError
        If the loss cannot be computed.

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

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls[name] += 1
        leaves, spec = tree_flatten(output)
        maps = found[name, calls[name]] = list[Tensor | None]()
        for position, value in enumerate(leaves):
            if isinstance(value, Tensor) and value.is_floating_point():
                if not value.requires_grad:
                    value = leaves[position] = value.detach().requires_grad_(True).clone()
                if value.requires_grad:
                    channels = channel_dim(module, value)
                    value.register_hook(partial(_store_weights, maps, len(maps), channels, batch.count))  # type: ignore[no-untyped-call]
                maps.append(None)
        return tree_unflatten(leaves, spec)

    inside = [(name, module) for name, module in model.named_modules() if is_within(name, pair.graphs)]
    names = [name for name, module in inside if name in pair.graphs or owns_tensors(module)]
    with forward_hooks(model, names, record), weights_require_gradients(model, False), torch.enable_grad():
        loss = batch_loss(model, adapter, labelled, index, seed).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    return {point: maps for point, maps in found.items() if any(value is not None for value in maps)}


def _store_weights(maps: list[Tensor | None], position: int, channels: int, images: int, gradient: Tensor) -> None:
    """Convert a gradient to weights. They are stored on the CPU as bfloat16, because every layer has a map."""
    if gradient.ndim < 3 or not bool(gradient.isfinite().all()):
        return  # not finite, one position per image, or proposals: those of the loss are not those of inference
    size = gradient.float().square().mean(channels).sqrt()
    each = size.reshape(images if len(size) % images == 0 else 1, -1)
    mean = each.mean(1, keepdim=True)
    weights = torch.where(mean > 0, MIN_WEIGHT + (1 - MIN_WEIGHT) * each / mean.clamp_min(1e-30), 1.0)
    maps[position] = weights.reshape(size.shape).bfloat16().cpu()


def flip_maps(weights: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the maps of the images in `mirrored` (N,). Maps without columns, (N, L), are set to 1 for these images."""
    if weights.ndim == 3:
        return torch.where(mirrored[:, None, None], weights.flip(-1), weights)
    return torch.where(mirrored.reshape(-1, *[1] * (weights.ndim - 1)), torch.ones_like(weights), weights)
