"""Batches are read once, normalized once and labelled once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor, nn

from fxprune.adapters import classifier, registry
from fxprune.adapters.protocol import Batch
from fxprune.datasets import calibration
from fxprune.datasets.calibration import open_calibration
from tests.helpers.models import pixels, tiny


def test_unlabelled_batches_are_labelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def label(model: nn.Module, batch: Batch) -> Batch:
        seen.append(batch.images)
        return classifier.ADAPTER.label(model, batch)

    def draw() -> Iterator[Tensor]:
        yield from (pixels(2, 3, 16, 16, seed=seed) for seed in range(3))

    monkeypatch.setattr(registry, "ADAPTERS", (replace(classifier.ADAPTER, label=label),))
    opened = open_calibration(tiny(), draw(), None)
    first = opened.first
    batches = list(opened.own_batches(opened.adapted))
    assert batches[0] is first
    assert [len(images) for images in seen] == [2, 2, 2]
    assert {batch.own_targets for batch in batches if batch is not None} == {True}
    kept = open_calibration(tiny(), draw(), None).keep()
    assert (len(kept.batches), kept.targets) == (3, "the model's own confident outputs")


@pytest.mark.parametrize(
    ("batches", "count", "world", "held_out"),
    [
        (8, 16, 1, [7]),
        (7, 64, 1, None),
        (15, 8, 1, None),
        (16, 8, 1, [7, 15]),
        (40, 16, 1, [7, 15]),  # until there are 32 images
        (8, 16, 8, None),  # one for each process must be left
    ],
)
def test_hold_out_takes_every_eighth_batch_if_that_is_enough(
    batches: int, count: int, world: int, held_out: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = open_calibration(tiny(), [pixels(count, 3, 4, 4) for _ in range(batches)], None).keep()
    monkeypatch.setattr(calibration, "world_size", lambda: world)
    rest, others = kept.hold_out(32)
    places = {id(batch): place for place, batch in enumerate(kept.batches)}
    taken = None if others is None else [places[id(batch)] for batch in others.batches]
    assert taken == held_out
    assert len(rest.batches) == batches - len(held_out or ())


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
def test_samples_share_no_image(
    batches: int, images: int, world: int, one: list[int], other: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = [pixels(2, 3, 16, 16, seed=seed) for seed in range(batches)]
    kept = open_calibration(tiny(), loader, None).keep()
    monkeypatch.setattr(calibration, "world_size", lambda: world)
    found = [
        [next(i for i, own in enumerate(kept.batches) if own is batch) for batch in part.batches]
        for part in kept.split(images, images + 2)
    ]
    assert found == [one, other]
