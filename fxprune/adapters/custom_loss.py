"""Adapter of any other model, by the caller's own ``loss(model, batch)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch, device_of, refuse_detection, select_items
from fxprune.errors import LossError
from fxprune.graph.fx_utils import full_precision, map_tensors
from fxprune.runtime.torch_internals import tree_leaves

Loss = Callable[[nn.Module, Any], Tensor]
"""A caller's own loss: ``loss(model, batch) -> scalar Tensor``, the mean over the images."""

FORMS = "any batch that loss(model, batch) takes"


def make_adapter(loss: Callable[[nn.Module, Any], Tensor]) -> Adapter:
    """Make the adapter for a caller's loss.

    Parameters
    ----------
    loss : callable
        ``loss(model, batch) -> scalar tensor``, the mean over the images of the batch. It is called with the model in
        eval mode, and with the batch of the loader, its tensors moved to the model's device. Because the model is a
        copy in float32, tensors in half precision become float32; all others keep their type.

    Examples
    --------
    >>> adapter = make_adapter(lambda model, batch: model(batch).mean())
    """

    def compute(model: nn.Module, batch: Batch) -> Tensor:
        value = loss(model.eval(), batch.images)
        if not isinstance(value, Tensor):
            raise LossError(f"loss(model, batch) returned {type(value).__name__}, not a scalar tensor")
        if value.numel() != 1:
            raise LossError(f"the loss has shape {tuple(value.shape)}; return a scalar, e.g. loss.mean()")
        return value.reshape(1)

    def label(model: nn.Module, batch: Batch) -> Batch:
        return Batch(batch.images, batch.images, batch.count)  # the loss makes its own targets from the batch

    return Adapter(
        family="model with the caller's loss",
        forms=FORMS,
        matches=lambda model, raw: True,
        prepare=lambda model: None,
        normalize=normalize,
        loss=compute,
        predict=compute,
        label=label,
        select_targets=lambda model, batch, numbers: select_items(batch.images, numbers),
        detections=lambda model, batch: None,
        detect=refuse_detection,
        collate=refuse_detection,
        whole_model_is_graph=True,
    )


def normalize(model: nn.Module, raw: Any) -> Batch:
    """Move a batch to the model's device, in float32 where it is in half precision, and count its images.

    The count is the leading dimension of the first tensor of rank 4, else the number of tensors of rank 3.
    """
    device = device_of(model)
    moved = map_tensors(dict(raw) if isinstance(raw, Mapping) else raw, lambda value: full_precision(value.to(device)))
    tensors = [leaf for leaf in tree_leaves(moved) if isinstance(leaf, torch.Tensor)]
    stacked = [len(tensor) for tensor in tensors if tensor.ndim == 4]
    singles = sum(tensor.ndim == 3 for tensor in tensors)
    return Batch(moved, moved, max(1, stacked[0] if stacked else singles))
