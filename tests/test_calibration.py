"""Batches are read once, normalized once and labelled once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor, nn

from fxprune.adapters import classifier
from fxprune.adapters.protocol import Batch
from fxprune.datasets import calibration as calibrations
from fxprune.datasets.calibration import Calibration
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


@pytest.mark.parametrize(
    ("batches", "images", "world", "one", "other"),
    [
        (8, 99, 1, [0, 2, 4, 6], [1, 3, 5, 7]),
        (8, 3, 1, [0, 2], [1, 3, 4]),  # as many batches of two as hold three images, and five others
        (1, 3, 1, [0], [0]),
        (9, 99, 2, [0, 2, 4, 6, 8], [1, 3, 5, 7]),
        (9, 1, 2, [0, 2], [1, 3]),  # one for each process at least
        (3, 99, 2, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_two_samples_have_no_image_in_common(
    batches: int, images: int, world: int, one: list[int], other: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration = tiny(), Calibration([pixels(2, 3, 16, 16, seed=seed) for seed in range(batches)])
    calibration.keep(model, classifier.ADAPTER)
    kept = list(calibration)
    monkeypatch.setattr(calibrations, "rank_and_world", lambda: (0, world))
    found = [
        [next(i for i, own in enumerate(kept) if own is batch) for batch in part]
        for part in calibration.apart(images, images + 2)
    ]
    assert found == [one, other]
