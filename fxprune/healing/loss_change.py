"""How much the loss of a pruned model differs from that of the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch
from fxprune.attribution.criteria import part_sizes
from fxprune.errors import LossError
from fxprune.runtime.distributed import all_gather, raise_on_all_ranks


class LossChange:
    """Measures how much the loss of pruned versions of a model differs from that of the model.

    Parameters
    ----------
    original : AdaptedModel
        The model before it was pruned.
    batches : sequence of (int, Batch)
        This process's share of the images, with targets and with their numbers among all.
    """

    noise_std = 0.05
    """Standard deviation of what sums of single damages leave unexplained, in the logarithm of what has grown."""

    def __init__(self, original: AdaptedModel, batches: Sequence[tuple[int, Batch]]) -> None:
        self.original, self.batches = original, batches
        self.before = self.loss_parts(original)
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

    def loss_parts(self, version: AdaptedModel) -> list[Tensor]:
        """Compute the parts (P,) of the loss of each batch."""
        with version.running(grad=False), raise_on_all_ranks():
            return [version.loss(index, batch).double().cpu() for index, batch in self.batches]

    def _mean_change(self, pruned: nn.Module, count: Callable[[Tensor], Tensor]) -> float:
        try:
            after = self.loss_parts(self.original.copy_version(pruned))
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
