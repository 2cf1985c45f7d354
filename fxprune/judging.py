"""What a pruned model's loss has grown by: the judge of plans and of healings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fxprune.calibration import take_loss
from fxprune.criteria import part_sizes
from fxprune.detectors.batch import Adapter, Batch, device_of
from fxprune.detectors.choice import network_of
from fxprune.errors import LossError
from fxprune.isolation import private_copy, untouched_randomness
from fxprune.ranks import failing_together, gathered, on_device


class Judge:
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

    def __init__(self, model: nn.Module, adapter: Adapter, batches: Sequence[tuple[int, Batch]], seed: int) -> None:
        self.adapter, self.batches, self.seed = adapter, batches, seed
        self.before = self.parts(model)
        size = self._mean(self.before)
        self.size = part_sizes(size) if len(size) > 1 else size.abs().clamp_min(1.0)

    def worse(self, pruned: nn.Module) -> float:
        """How much the parts of the loss have grown, relative to their own sizes, summed; infinite where one breaks.

        A loss of a single part is relative to 1 at least: that of a model sure of its own labels is next to nothing.
        """
        return self._compared(pruned, lambda change: change)

    def astray(self, pruned: nn.Module) -> float:
        """How far the parts of the loss are off, batch by batch, more or less alike; else as `worse`.

        It is least where a model does what it did, which the loss itself need not be.
        """
        return self._compared(pruned, torch.abs)

    def parts(self, model: nn.Module) -> list[Tensor]:
        """Parts (P,) of the loss of each batch."""
        network = private_copy(network_of(model))
        self.adapter.prepare(network)
        with (
            on_device(device_of(network)),
            untouched_randomness(network),
            torch.inference_mode(False),
            torch.no_grad(),
            failing_together(),
        ):
            return [
                take_loss(network, self.adapter, batch, index, self.seed).double().cpu()
                for index, batch in self.batches
            ]

    def _compared(self, pruned: nn.Module, count: Callable[[Tensor], Tensor]) -> float:
        try:
            after = self.parts(pruned)
        except LossError:
            return math.inf
        changes = [count((new - old) / self.size) for new, old in zip(after, self.before, strict=True)]
        return float(self._mean(changes).sum())

    def _mean(self, rows: Sequence[Tensor]) -> Tensor:
        """Mean over the images of all processes."""
        sums = [batch.count * row for (_, batch), row in zip(self.batches, rows, strict=True)]
        own = sum(sums, torch.zeros((), dtype=torch.float64)), sum(batch.count for _, batch in self.batches)
        totals, counts = zip(*gathered(own), strict=True)
        mean: Tensor = sum(totals) / sum(counts)
        return mean
