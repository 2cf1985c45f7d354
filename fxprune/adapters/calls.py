"""One batch through an adapter: read it, label it, take its loss. Errors name the batch."""

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
    """Normalize one batch; without labels it gets the model's own confident outputs. Errors name its index."""
    batch = normalize_batch(model, adapter, raw, index)
    if batch.targets is not None:
        return batch
    with _prefix_batch_index(index):
        return replace(adapter.label(model, batch), own_targets=True)


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


@dataclass(frozen=True)
class AdaptedModel:
    """A private copy of a model with its adapter, ready to be run.

    Attributes
    ----------
    module : Module
        The copy. What is done to it does not reach the caller's model.
    adapter : Adapter
        How to run it.
    seed : int
        Of samplers inside the loss.

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
        """Copy a model, or what a `YOLO` object holds, and prepare the copy for its loss."""
        with torch.inference_mode(False):
            module = private_copy(unwrap(model))
            adapter.prepare(module)
        return cls(module, adapter, seed)

    def copy_version(self, model: nn.Module) -> AdaptedModel:
        """Copy another version of the same model, to be run in the same way."""
        return type(self).copy_of(model, self.adapter, self.seed)

    def normalize(self, index: int, raw: Any) -> Batch:
        """Bring a loader's batch into the form the adapter works on; errors name its index."""
        return normalize_batch(self.module, self.adapter, raw, index)

    def read(self, index: int, raw: Any) -> Batch:
        """The same, with the model's own confident outputs as targets where it came without labels."""
        return normalize_and_label(self.module, self.adapter, raw, index)

    def loss(self, index: int, batch: Batch) -> Tensor:
        """Compute the parts (P,) of a batch's loss; see `batch_loss`."""
        return batch_loss(self.module, self.adapter, batch, index, self.seed)

    def predict(self, batch: Batch) -> Any:
        """Run the model as at inference."""
        return self.adapter.predict(self.module, batch)

    def label(self, batch: Batch) -> Batch:
        """Use the model's own confident outputs as a batch's targets."""
        return self.adapter.label(self.module, batch)

    def detections(self, batch: Batch) -> list[dict[str, Tensor]] | None:
        """Find boxes in a batch's images; None if the model gives something else, or more."""
        return self.adapter.detections(self.module, batch)

    @contextmanager
    def running(self, grad: bool) -> Iterator[None]:
        """Run the model until the end of the block, and leave everything else as it was.

        The model's device is the current one, inference mode is off, gradients are recorded or not. Random state and
        the modes of all modules are restored.
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
    """Make a network's device the current one, leave inference mode and, at the end, restore torch's random state."""
    with (
        on_device(device_of(network)),
        preserve_rng_state(network),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
    ):
        yield
