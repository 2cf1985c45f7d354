"""The form in which images reach a classifier."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.adapters.classifier import normalize

PIXELS = torch.randint(0, 256, (3, 3, 12, 12), dtype=torch.uint8)
SEEN: list[torch.dtype] = []
"""The types of the images that the models of this file were called with."""


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


class Scaled(nn.Module):
    """A classifier; `scale` says whether it converts pixels of 0 to 255 itself."""

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.scale = scale
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            SEEN.append(x.dtype)
        x = self.stem(x / 255 if self.scale else x)
        return self.head((x + self.block(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_integer_images_stay_integers_for_a_model_that_takes_them(labelled: bool, as_list: bool) -> None:
    model = Scaled(True).train()
    images = list(PIXELS) if as_list else PIXELS
    batch = normalize(model, (images, torch.tensor([0, 1, 2])) if labelled else [PIXELS])
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images, PIXELS)
    assert model.training


def test_integer_images_become_floats_for_a_model_that_takes_only_these() -> None:
    batch = normalize(Scaled(False), (PIXELS, torch.tensor([0, 1, 2])))
    torch.testing.assert_close(batch.images, PIXELS.float() / 255)


def test_float_images_are_not_scaled_or_tried() -> None:
    model = Scaled(True)
    images = PIXELS.double()
    batch = normalize(model, (images, torch.tensor([0, 1, 2])))
    assert torch.equal(batch.images, images.float())
    assert not SEEN


def test_pruned_and_healed_on_the_pixels_that_the_model_takes() -> None:
    model = Scaled(True).eval()
    batches = [(PIXELS, torch.tensor([0, 1, 2])), (PIXELS.flip(0), torch.tensor([2, 1, 0]))]
    pruned = fxprune.compile(model, batches, budget=0.1, heal="mimic", steps=2)
    assert pruned(PIXELS).shape == (3, 5)
    assert set(SEEN) == {torch.uint8}
