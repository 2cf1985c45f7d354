"""One batch through an adapter: read it, label it, take its loss. Errors name the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch
from fxprune.errors import BatchError, FxpruneError, LossError
from fxprune.graph.fx_utils import map_tensors


def normalize_and_label(model: nn.Module, adapter: Adapter, raw: Any, index: int) -> tuple[Batch, bool]:
    """Normalize one batch, label it if need be, and say whether it came with labels; errors name its index."""
    batch = normalize_batch(model, adapter, raw, index)
    with _prefix_batch_index(index):
        return (batch, True) if batch.targets is not None else (adapter.label(model, batch), False)


def normalize_batch(model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
    """Bring one batch into the form the adapter works on; errors name its index."""
    with _prefix_batch_index(index):
        if raw is None:
            raise BatchError(f"got None; known forms: {adapter.forms}")
        return adapter.normalize(model, map_tensors(raw, _copy_inference_tensor))


def batch_loss(model: nn.Module, adapter: Adapter, batch: Batch, index: int, seed: int) -> Tensor:
    """Compute a batch's loss, samplers seeded, and hold it to what a loss must be.

    Returns
    -------
    Tensor
        Its parts, finite, of shape (P,): they sum to the loss.

    Raises
    ------
    LossError
        If it is not finite; names the batch.
    BatchError
        If the model refuses the batch; names it, the reason, and the forms that are known.
    """
    torch.manual_seed(seed)
    try:
        with _prefix_batch_index(index):
            value = adapter.loss(model, batch)
    except FxpruneError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        text = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise BatchError(
            f"batch {index}: the {adapter.family} could not take its loss: {type(error).__name__}: {text.rstrip('.')}."
            f" {_describe_label_range(batch)}Known forms: {adapter.forms}"
        ) from error
    total = float(value.detach().sum())
    if not math.isfinite(total):
        raise LossError(f"batch {index}: the loss is {total}; leave that batch out or mend its labels")
    return value.reshape(-1)


def _copy_inference_tensor(value: Tensor) -> Tensor:
    """Copy a tensor that was made in inference mode: gradients cannot pass through those."""
    return value.clone() if value.is_inference() else value


@contextmanager
def _prefix_batch_index(index: int) -> Iterator[None]:
    """Put the batch's index before the message of an error about it."""
    try:
        yield
    except FxpruneError as error:
        raise type(error)(f"batch {index}: {error}") from error.__cause__


def _describe_label_range(batch: Batch) -> str:
    """Say which labels a batch holds: out-of-range labels are the usual cause of a refusal."""
    rows = batch.targets if isinstance(batch.targets, list) else []
    labels = [row["labels"] for row in rows if isinstance(row, dict) and isinstance(row.get("labels"), Tensor)]
    joined = torch.cat([label.reshape(-1) for label in labels]) if labels else torch.empty(0)
    return f"Its labels run from {int(joined.min())} to {int(joined.max())}. " if len(joined) else ""
