"""Two versions of a model are timed side by side, with as many images and rounds as a few seconds allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.adapters import classifier
from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.custom_loss import make_adapter
from fxprune.adapters.protocol import Batch
from fxprune.profiling.comparison import MAX_ROUNDS, MIN_ROUNDS, SECONDS, compare_latency
from tests.helpers.clocks import FakeClock


class PerImage(nn.Module):
    """A classifier that takes a time per image on a clock."""

    def __init__(self, clock: FakeClock, *seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds, self.count = clock, seconds, 0

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += len(x) * self.seconds[self.count % len(self.seconds)]
        self.count += 1
        return x.mean((2, 3))


def compare(before: float, *after: float, images: int = 4) -> Any:
    clock = FakeClock()
    versions = [AdaptedModel(PerImage(clock, *seconds), classifier.ADAPTER) for seconds in ((before,), after)]
    return compare_latency(versions[0], versions[1], Batch(torch.rand(images, 3, 4, 4), None, images), clock=clock)


def test_quick_calls_are_timed_on_the_whole_batch_in_many_rounds() -> None:
    found = compare(0.001, 0.00075)
    assert (found.images, found.batch, found.rounds, found.device) == (4, 4, MAX_ROUNDS, "cpu")
    assert (found.before_ms, found.after_ms, found.ratio) == pytest.approx((1, 0.75, 0.75))
    assert (found.error, found.floor) == pytest.approx((0, 0), abs=1e-9)
    assert found.threads == torch.get_num_threads()


@pytest.mark.parametrize(("seconds", "images"), [(0.09, 2), (0.5, 1), (9.0, 1)])
def test_slow_calls_are_timed_on_fewer_images(seconds: float, images: int) -> None:
    found = compare(seconds, seconds, images=16)
    assert (found.images, found.batch) == (images, 16)
    assert found.rounds == max(MIN_ROUNDS, int(SECONDS / (3 * images * seconds)))


def test_noise_is_in_the_error() -> None:
    assert compare(0.001, 0.0005, 0.0015).error > 0.1


def test_batch_of_unknown_form_stays_whole() -> None:
    clock = FakeClock()
    adapter = make_adapter(lambda model, batch: model(batch["image"]).mean())
    first, second = (AdaptedModel(PerImage(clock, 1.0), adapter) for _ in range(2))
    found = compare_latency(first, second, Batch({"image": torch.rand(2, 3, 4, 4)}, None, 2), clock=clock)
    assert (found.images, found.rounds) == (2, MIN_ROUNDS)
