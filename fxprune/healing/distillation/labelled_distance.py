"""Adds the model's own loss on labels to the feature distance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.adapters.protocol import Batch
from fxprune.healing.distillation.feature_distance import FeatureDistance, take_image_shard
from fxprune.healing.saliency import Maps
from fxprune.runtime.distributed import all_reduce_sum


class LabelledDistance:
    """Feature distance plus the model's own loss on labels: ``D + (D0 / T0) T``.

    D is the feature distance, T the task loss: the sum of the parts of the model's own loss on the labels. D0 and T0
    are their means on held-out batches before the training. So both terms have the same value at first, and a change of
    1 % of either counts the same, whatever the scale of the loss. Labels beside the outputs of a teacher are due to
    Hinton et al. (2015, arXiv 1503.02531), features of the teacher as targets to FitNets (2015, arXiv 1412.6550).

    Parameters
    ----------
    distance : FeatureDistance
    held_out : sequence of Batch
        With targets.
    seed : int
        Seed of samplers inside the loss.

    Examples
    --------
    >>> train_mimic(LabelledDistance(distance, held_out), training, held_out, Schedule())   # doctest: +SKIP
    """

    def __init__(self, distance: FeatureDistance, held_out: Sequence[Batch], seed: int = 0) -> None:
        self.distance, self.pair, self.seed = distance, distance.pair, seed
        features, task = distance.mean(held_out), abs(self._mean_task_loss(held_out))
        self.weight = features / task if task > 0 else 0.0

    def __call__(self, batch: Batch, saliency: Maps | None = None, mirrored: Tensor | None = None) -> Tensor:
        """Return the sum (scalar) over the images of all processes; `saliency` and `mirrored` as for the distance.

        The task loss is of the images as they are: mirrored objects may need other labels.
        """
        return self.distance(batch, saliency, mirrored) + self.weight * self.task_loss(batch)

    def mean(self, batches: Sequence[Batch]) -> float:
        """Return the mean over batches, weighted by their numbers of images."""
        return self.distance.mean(batches) + self.weight * self._mean_task_loss(batches)

    def task_loss(self, batch: Batch) -> Tensor:
        """Return the loss (scalar) of the student on the labels: the mean over the images of all processes."""
        own, _ = take_image_shard(self.pair, batch)
        torch.manual_seed(self.seed)
        value = self.pair.adapter.loss(self.pair.student, own).sum().double() * (own.count / batch.count)
        # the value is equal in all processes, to the last bit
        return all_reduce_sum(value.detach()) + (value - value.detach())

    def _mean_task_loss(self, batches: Sequence[Batch]) -> float:
        with torch.no_grad():
            total = sum(float(self.task_loss(batch)) * batch.count for batch in batches)
        return total / sum(batch.count for batch in batches)
