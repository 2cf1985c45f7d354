"""Invalid batches for classifiers are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fxprune
from fxprune import BatchError
from tests.helpers.hostile import assert_refused, assert_unchanged, removed
from tests.helpers.models import labelled, pixels, tiny


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(
    "batch",
    [
        {"img": pixels(2, 3, 16, 16)},
        "cat.jpg",
        3,
        np.zeros((2, 3, 16, 16), np.float32),
        pixels(3, 16, 16),
        pixels(16),
        (pixels(2, 3, 16, 16), [1, 2]),
        (pixels(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor([1, 2])),
        (np.zeros((2, 3, 16, 16), np.float32), torch.tensor([1, 2])),
    ],
    ids=["dict", "string", "number", "array", "image", "vector", "list of labels", "triple", "array and labels"],
)
def test_classifier_batch_of_unknown_form_is_refused(batch: Any, where: int) -> None:
    model, batches = tiny(), list[Any](labelled())
    batches.insert(where, batch)
    with assert_refused(model, BatchError, rf"^batch {where}: .*Tensor\(N, 3, H, W\), Tensor\(N\)"):
        fxprune.compile(model, batches, 0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 5]), "labels .*1 to 5, .*0 to 4"),
        (torch.tensor([-1, 2]), "labels .*-1 to 2, .*0 to 4"),
        (torch.tensor([1, 2, 3]), "2 images but 3 labels"),
        (torch.tensor([1.0, 2.0]), "labels .*floating point; .*integers"),
        (torch.rand(2, 4), "4 .*classes|classes.* 4"),
    ],
)
@pytest.mark.parametrize("where", [0, 1])
def test_classifier_batch_with_bad_labels_is_refused(labels: Tensor, message: str, where: int) -> None:
    model, batches = tiny(), labelled()
    batches.insert(where, (pixels(2, 3, 16, 16), labels))
    with assert_refused(model, BatchError, f"^batch {where}: .*({message})"):
        fxprune.compile(model, batches, 0.1)


def test_classifier_batch_of_mixed_sizes_is_refused() -> None:
    model = tiny()
    with assert_refused(model, BatchError, r"^batch 0: .*\(3, 16, 16\), \(3, 16, 24\)\]; resize or pad"):
        fxprune.compile(model, [[pixels(3, 16, 24), pixels(3, 16, 16)]], 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_classifier_batch_with_a_non_finite_image_is_refused(value: float) -> None:
    model, batches = tiny(), labelled()
    batches[1][0][1, 2, 3, 4] = value
    with assert_refused(model, BatchError, "^batch 1: .*image .*NaN"):
        fxprune.compile(model, batches, 0.1)


@pytest.mark.parametrize("batch", [pixels(0, 3, 16, 16), [], (pixels(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64))])
def test_classifier_batch_without_images_is_refused(batch: Any) -> None:
    model = tiny()
    with assert_refused(model, BatchError, "^batch 0: .*no image"):
        fxprune.compile(model, [batch], 0.1)


def test_classifier_batch_with_wrong_channels_is_refused() -> None:
    model = tiny()
    with assert_refused(model, BatchError, "^batch 0: .*channels.*[Kk]nown forms"):
        fxprune.compile(model, [(pixels(2, 1, 16, 16), torch.tensor([1, 2]))], 0.1)


@pytest.mark.parametrize(
    "batch",
    [
        (pixels(1, 3, 16, 16), torch.tensor([4])),
        pixels(1, 3, 16, 16),
        [pixels(1, 3, 16, 16)],
        [pixels(3, 16, 16)],
        (pixels(1, 3, 16, 16), torch.full((1, 5), 0.2)),
        ((255 * pixels(1, 3, 16, 16)).byte(), torch.tensor([4])),
    ],
    ids=["labelled", "tensor", "list of a batch", "list of an image", "soft labels", "bytes"],
)
def test_classifier_batch_of_one_image_works(batch: Any) -> None:
    model = tiny()
    with assert_unchanged(model):
        pruned = fxprune.compile(model, [batch], 0.1)
    assert len(removed(pruned)) == 1
    assert fxprune.report(pruned).settings["images"] == 1
