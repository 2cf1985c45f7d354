"""Runs one batch through an adapter: read it, label it, compute its loss. Errors name the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.adapters.registry import unwrap
from fxprune.errors import BatchError, FxpruneError, LossError
from fxprune.graph.fx_utils import map_tensors
from fxprune.runtime.distributed import on_device
from fxprune.runtime.private_copy import preserve_rng_state, private_copy


def normalize_and_label(model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
    """Normalize one batch. Without labels, the targets are the model's own confident outputs. Errors name its index."""
    batch = normalize_batch(model, adapter, raw, index)
    if batch.targets is not None:
        return batch
    with _prefix_batch_index(index):
        return replace(adapter.label(model, batch), own_targets=True)


def normalize_batch(model: nn.Module, adapter: Adapter, raw: Any, index: int) -> Batch:
    """Convert one batch to the form that the adapter works on. Errors name its index."""
    with _prefix_batch_index(index):
        if raw is None:
            raise BatchError(f"got None; known forms: {adapter.forms}")
        return adapter.normalize(model, map_tensors(raw, _copy_inference_tensor))


def batch_loss(model: nn.Module, adapter: Adapter, batch: Batch, index: int, seed: int) -> Tensor:
    """Compute the loss of a batch with seeded samplers, and check that it is finite.

    Returns
    -------
    Tensor
        The parts of the loss, of shape (P,). The loss is their sum.

    Raises
    ------
    LossError
        If the loss is not finite. The message names the batch.
    BatchError
        If the model raises an error. The message names the batch, the error, and the known batch forms.
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
        raise LossError(f"batch {index}: the loss is {total}; leave that batch out or correct its labels")
    return value.reshape(-1)


def _copy_inference_tensor(value: Tensor) -> Tensor:
    """Copy a tensor that was created in inference mode: gradients cannot pass through such tensors."""
    return value.clone() if value.is_inference() else value


@contextmanager
def _prefix_batch_index(index: int) -> Iterator[None]:
    """Add the index of the batch to the messages of errors in the block."""
    try:
        yield
    except FxpruneError as error:
        raise type(error)(f"batch {index}: {error}") from error.__cause__


def _describe_label_range(batch: Batch) -> str:
    """Return the range of a batch's labels in words: labels out of range are the most common error."""
    rows = batch.targets if isinstance(batch.targets, list) else []
    labels = [row["labels"] for row in rows if isinstance(row, dict) and isinstance(row.get("labels"), Tensor)]
    joined = torch.cat([label.reshape(-1) for label in labels]) if labels else torch.empty(0)
    return f"Its labels run from {int(joined.min())} to {int(joined.max())}. " if len(joined) else ""


@dataclass(frozen=True)
class AdaptedModel:
    """A private copy of a model with its adapter, ready to run.

    Attributes
    ----------
    module : Module
        The copy. Changes of it do not affect the caller's model.
    adapter : Adapter
        The functions that run it.
    seed : int
        Seed of samplers inside the loss.

    Examples
    --------
    >>> adapted = AdaptedModel.copy_of(model, adapter)             # doctest: +SKIP
    >>> with adapted.running(grad=True):                           # doctest: +SKIP
    ...     adapted.loss(0, adapted.read(0, raw)).sum().backward()
    """

    module: nn.Module
    adapter: Adapter
    seed: int = 0

    @classmethod
    def copy_of(cls, model: nn.Module, adapter: Adapter, seed: int = 0) -> AdaptedModel:
        """Copy a model, or the model inside a `YOLO` object, and prepare the copy for its loss."""
        with torch.inference_mode(False):
            module = private_copy(unwrap(model))
            adapter.prepare(module)
        return cls(module, adapter, seed)

    def copy_version(self, model: nn.Module) -> AdaptedModel:
        """Copy another version of the same model, with the same adapter and seed."""
        return type(self).copy_of(model, self.adapter, self.seed)

    def normalize(self, index: int, raw: Any) -> Batch:
        """Convert a loader's batch to the form that the adapter works on. Errors name its index."""
        return normalize_batch(self.module, self.adapter, raw, index)

    def read(self, index: int, raw: Any) -> Batch:
        """Normalize a batch. Without labels, its targets are the model's own confident outputs."""
        return normalize_and_label(self.module, self.adapter, raw, index)

    def loss(self, index: int, batch: Batch) -> Tensor:
        """Compute the parts (P,) of a batch's loss; see `batch_loss`."""
        return batch_loss(self.module, self.adapter, batch, index, self.seed)

    def predict(self, batch: Batch) -> Any:
        """Run the model at inference."""
        return self.adapter.predict(self.module, batch)

    def label(self, batch: Batch) -> Batch:
        """Use the model's own confident outputs as a batch's targets."""
        return self.adapter.label(self.module, batch)

    def detections(self, batch: Batch) -> list[dict[str, Tensor]] | None:
        """Return the boxes in a batch's images; None if the model outputs no boxes, or more than boxes."""
        return self.adapter.detections(self.module, batch)

    @contextmanager
    def running(self, grad: bool) -> Iterator[None]:
        """Set the state in which the model runs, and restore it at the end of the block.

        Inside, the model's device is the current device, inference mode is off, and gradients are on if `grad`. At the
        end, the random state and the modes of all modules are restored.
        """
        modes = {part: part.training for part in self.module.modules()}
        try:
            with isolated_run(self.module, grad):
                yield
        finally:
            for part, training in modes.items():
                part.training = training


@contextmanager
def isolated_run(network: nn.Module, grad: bool) -> Iterator[None]:
    """Make a network's device current and set the gradient mode until the end of the block; outside inference mode.

    Autocast of the caller is off: sums of products need float32. A loss may still switch it on for its own run. At the
    end, all these and torch's random state are restored.
    """
    with (
        on_device(device_of(network)),
        preserve_rng_state(network),
        torch.inference_mode(False),
        torch.autocast(device_of(network).type, enabled=False),
        torch.set_grad_enabled(grad),
    ):
        yield
