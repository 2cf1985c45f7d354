"""Batches are read once, normalized once and labelled once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from fxprune.calibration import Calibration
from fxprune.detectors import classifier
from fxprune.detectors.batch import Batch
from tests.models import pixels, tiny


def test_each_batch_without_labels_is_labelled_once() -> None:
    seen: list[Tensor] = []

    def label(model: nn.Module, batch: Batch) -> Batch:
        seen.append(batch.images)
        return classifier.ADAPTER.label(model, batch)

    def draw() -> Iterator[Tensor]:
        yield from (pixels(2, 3, 16, 16, seed=seed) for seed in range(3))

    model, adapter, calibration = tiny(), replace(classifier.ADAPTER, label=label), Calibration(draw())
    first = calibration.first(model, adapter)
    batches = [batch for _, batch in calibration.own(model, adapter)]
    assert batches[0] is first
    assert [len(images) for images in seen] == [2, 2, 2]
    assert calibration.targets == "the model's own confident outputs"
