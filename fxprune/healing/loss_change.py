"""Measures how much the loss of a pruned model differs from that of the original."""

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
    """Measures the change of the loss from the original model to its pruned versions, on fixed batches.

    Parameters
    ----------
    original : AdaptedModel
        The model before pruning.
    batches : sequence of (int, Batch)
        This process's share of the batches, with targets, and their numbers among the batches of all processes.

    Examples
    --------
    >>> change = LossChange(original, [(0, original.label(batch))])   # doctest: +SKIP
    >>> change.deviation(original.module)                             # doctest: +SKIP
    0.0
    """

    noise_std = 0.05
    """Standard deviation of a plan's ``log(1 + increase)`` around the sum of the effects of its regions."""

    def __init__(self, original: AdaptedModel, batches: Sequence[tuple[int, Batch]]) -> None:
        self.original, self.batches = original, batches
        self.before = self.loss_parts(original)
        size = self._mean(self.before)
        self.part_scale = part_sizes(size) if len(size) > 1 else size.abs().clamp_min(1.0)

    def to_settings(self, increase: float) -> dict[str, float]:
        """Return the plan settings that record an increase."""
        return {"loss_increase": increase}

    def increase(self, pruned: nn.Module) -> float:
        """Return the sum, over the parts of the loss, of their relative increases; infinity if the loss is not finite.

        Each part is divided by its size in the original. A loss of a single part is divided by at least 1, because it
        is almost zero if a model is sure of its own labels.
        """
        return self._mean_change(pruned, lambda change: change)

    def deviation(self, pruned: nn.Module) -> float:
        """Return the same sum as `increase`, of the absolute values of the changes per batch.

        It is zero for the original. `increase` can be negative: the original need not have the smallest loss.
        """
        return self._mean_change(pruned, torch.abs)

    def loss_parts(self, version: AdaptedModel) -> list[Tensor]:
        """Return the parts (P,) of the loss of each batch."""
        with version.running(grad=False), raise_on_all_ranks():
            return [version.loss(index, batch).double().cpu() for index, batch in self.batches]

    def _mean_change(self, pruned: nn.Module, transform: Callable[[Tensor], Tensor]) -> float:
        """Return the mean over images of the transformed relative changes, summed over the parts."""
        try:
            after = self.loss_parts(self.original.copy_version(pruned))
        except LossError:
            return math.inf
        changes = [transform((new - old) / self.part_scale) for new, old in zip(after, self.before, strict=True)]
        return float(self._mean(changes).sum())

    def _mean(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the mean over the images of all processes."""
        sums = [batch.count * row for (_, batch), row in zip(self.batches, rows, strict=True)]
        own = sum(sums, torch.zeros((), dtype=torch.float64)), sum(batch.count for _, batch in self.batches)
        totals, counts = zip(*all_gather(own), strict=True)
        mean: Tensor = sum(totals) / sum(counts)
        return mean
