"""Computes the distance between the features of a pruned model and those of the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.adapters.protocol import Batch
from fxprune.graph.fx_utils import full_precision
from fxprune.graph.operators import channel_dim, is_norm_layer, to_rows
from fxprune.healing.saliency import Maps, flip_maps
from fxprune.healing.teacher_student import FeatureRecorder, TeacherStudent
from fxprune.runtime.distributed import all_reduce_sum, belongs_to_rank, rank_and_world

VARIANCE_IMAGES = 64
"""Number of images for the variance of features. The batch that reaches it is used completely."""

FeatureKey = tuple[str, int]
"""Path of a module whose outputs are compared, and the index of a tensor in its output."""


class FeatureDistance:
    """Mean over all compared features of ``log(1 + e)``, where e is the mean squared error divided by the variance.

    The logarithm keeps a feature with a large error from dominating the others. The compared features are the outputs
    of the islands and of the norms in them. Without islands, they are the outputs of the whole model.

    Parameters
    ----------
    pair : TeacherStudent
    batches : sequence of Batch
        Batches for the variances, the same in all processes. Each process runs its share of the images of every batch.

    Examples
    --------
    >>> distance = FeatureDistance(pair, batches)       # doctest: +SKIP
    >>> distance(batches[0]).backward()                 # doctest: +SKIP
    """

    def __init__(self, pair: TeacherStudent, batches: Sequence[Batch]) -> None:
        self.pair = pair
        norms = (name for name, layer in pair.layers() if is_norm_layer(layer))
        self.points = sorted({*pair.graphs, *norms}) or [""]
        self.variances = self._variances(batches)

    def __call__(self, batch: Batch, saliency: Maps | None = None, mirrored: Tensor | None = None) -> Tensor:
        """Return the distance (scalar) over the images of all processes.

        `saliency` weights the positions. `mirrored` (N,), bool, marks the images that are mirrored before, with their
        saliency maps.
        """
        own, which = take_image_shard(self.pair, batch)
        if mirrored is not None:
            own = _mirror_images(own, mirrored[which])
        teacher = self._teacher_features(own)
        student = FeatureRecorder(self.points, self.pair.detached_modules, teacher).run(
            self.pair.student, self.pair.adapter, own
        )
        errors: dict[FeatureKey, Tensor] = {}
        counts: dict[FeatureKey, int] = {}
        for (name, call), values in teacher.values.items():
            maps = saliency.get((name, call), ()) if saliency is not None else ()
            for number, (old, new) in enumerate(zip(values, student.values[name, call], strict=True)):
                squares = (
                    full_precision(new - old).square().sum(channel_dim(self.pair.student.get_submodule(name), old))
                )
                weights = maps[number] if number < len(maps) else None
                if weights is not None and weights[which].shape == squares.shape:
                    weights = weights if mirrored is None else flip_maps(weights, mirrored)
                    squares = squares * weights[which].to(squares)
                errors[name, number] = errors.get((name, number), 0.0) + squares.sum()
                counts[name, number] = counts.get((name, number), 0) + squares.numel()
        error = torch.stack([errors[key] for key in errors]).double()
        count = all_reduce_sum(error.new_tensor([counts[key] for key in errors]))
        variance = torch.stack([self.variances[key] for key in errors])
        # the value is equal in all processes, to the last bit
        total = all_reduce_sum(error.detach()) + (error - error.detach())
        return torch.log1p(total / count / variance).mean()

    def mean(self, batches: Sequence[Batch], saliency: Sequence[Maps] = ()) -> float:
        """Return the mean distance over batches, weighted by their numbers of images."""
        with torch.no_grad():
            parts = [
                float(self(batch, saliency[number] if saliency else None)) * batch.count
                for number, batch in enumerate(batches)
            ]
        return sum(parts) / sum(batch.count for batch in batches)

    def _variances(self, batches: Sequence[Batch]) -> dict[FeatureKey, Tensor]:
        """Return the variances over positions, summed over channels. Every call of a module has its own means."""
        sums: dict[tuple[str, int, int], Tensor] = {}
        images = 0
        for batch in batches:
            if images >= VARIANCE_IMAGES:
                break
            images += batch.count
            for (name, call), values in self._teacher_features(take_image_shard(self.pair, batch)[0]).values.items():
                for number, value in enumerate(values):
                    rows = to_rows(self.pair.student.get_submodule(name), value).double()
                    part = torch.stack([rows.new_full(rows.shape[1:], len(rows)), rows.sum(0), rows.square().sum(0)])
                    sums[name, number, call] = sums.get((name, number, call), 0.0) + part
        found: dict[FeatureKey, list[Tensor]] = {}
        for (name, number, _), (count, once, twice) in zip(sums, map(all_reduce_sum, sums.values()), strict=True):
            spread = (twice - once.square() / count).clamp_min(0).sum()
            found.setdefault((name, number), []).append(torch.stack([spread, count[0]]))
        totals = {key: torch.stack(parts).sum(0) for key, parts in found.items()}
        return {key: (spread / count).clamp_min(1e-12) for key, (spread, count) in totals.items()}

    def _teacher_features(self, own: Batch) -> FeatureRecorder:
        with torch.no_grad():
            return FeatureRecorder(self.points, self.pair.detached_modules).run(
                self.pair.teacher, self.pair.adapter, own
            )


def take_image_shard(pair: TeacherStudent, batch: Batch) -> tuple[Batch, Any]:
    """Return this process's share of the images of a batch, with their targets, and their indices in the batch."""
    if rank_and_world()[1] == 1:
        return batch, slice(None)
    which = [index for index in range(batch.count) if belongs_to_rank(index)]
    return pair.select(batch, which), which


def _mirror_images(batch: Batch, mirrored: Tensor) -> Batch:
    if not mirrored.any():
        return batch
    images = [image.flip(-1) if flip else image for image, flip in zip(batch.images, mirrored.tolist(), strict=True)]
    return Batch(torch.stack(images) if isinstance(batch.images, Tensor) else images, None, batch.count)
