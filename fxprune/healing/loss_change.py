"""How much the loss of a pruned model differs from that of the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxprune.adapters.calls import batch_loss
from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.adapters.registry import unwrap
from fxprune.attribution.criteria import part_sizes
from fxprune.errors import LossError
from fxprune.runtime.distributed import all_gather, on_device, raise_on_all_ranks
from fxprune.runtime.private_copy import preserve_rng_state, private_copy


class LossChange:
    """Takes the loss of pruned versions of a model.

    Parameters
    ----------
    model : Module
        As it was.
    adapter : Adapter
    batches : sequence of (int, Batch)
        This process's share of the images, with targets and with their numbers among all.
    seed : int
        For samplers inside the loss.
    """

    noise_std = 0.05
    """Standard deviation of what sums of single damages leave unexplained, in the logarithm of what has grown."""

    def __init__(self, model: nn.Module, adapter: Adapter, batches: Sequence[tuple[int, Batch]], seed: int) -> None:
        self.adapter, self.batches, self.seed = adapter, batches, seed
        self.before = self.loss_parts(model)
        size = self._mean(self.before)
        self.part_scale = part_sizes(size) if len(size) > 1 else size.abs().clamp_min(1.0)

    def to_settings(self, worse: float) -> dict[str, float]:
        """What a plan keeps of a judgement."""
        return {"loss_increase": worse}

    def increase(self, pruned: nn.Module) -> float:
        """How much the parts of the loss have grown, relative to their own sizes, summed; infinite where one breaks.

        A loss of a single part is relative to 1 at least: that of a model sure of its own labels is next to nothing.
        """
        return self._mean_change(pruned, lambda change: change)

    def deviation(self, pruned: nn.Module) -> float:
        """How far the parts of the loss are off, batch by batch, more or less alike; else as `increase`.

        It is least where a model does what it did, which the loss itself need not be.
        """
        return self._mean_change(pruned, torch.abs)

    def loss_parts(self, model: nn.Module) -> list[Tensor]:
        """Parts (P,) of the loss of each batch."""
        with to_be_run(model, self.adapter) as network:
            return [
                batch_loss(network, self.adapter, batch, index, self.seed).double().cpu()
                for index, batch in self.batches
            ]

    def _mean_change(self, pruned: nn.Module, count: Callable[[Tensor], Tensor]) -> float:
        try:
            after = self.loss_parts(pruned)
        except LossError:
            return math.inf
        changes = [count((new - old) / self.part_scale) for new, old in zip(after, self.before, strict=True)]
        return float(self._mean(changes).sum())

    def _mean(self, rows: Sequence[Tensor]) -> Tensor:
        """Mean over the images of all processes."""
        sums = [batch.count * row for (_, batch), row in zip(self.batches, rows, strict=True)]
        own = sum(sums, torch.zeros((), dtype=torch.float64)), sum(batch.count for _, batch in self.batches)
        totals, counts = zip(*all_gather(own), strict=True)
        mean: Tensor = sum(totals) / sum(counts)
        return mean


@contextmanager
def to_be_run(model: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """A private copy of a version, ready to be run without gradients by all processes together."""
    network = private_copy(unwrap(model))
    adapter.prepare(network)
    with (
        on_device(device_of(network)),
        preserve_rng_state(network),
        torch.inference_mode(False),
        torch.no_grad(),
        raise_on_all_ranks(),
    ):
        yield network
