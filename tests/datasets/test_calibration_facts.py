"""What makes scores meaningless is said, and nothing is said of ordinary images and targets."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fxprune
from fxprune import FxpruneWarning, LossError
from fxprune.adapters import classifier, torchvision
from fxprune.adapters.protocol import Batch
from fxprune.adapters.ultralytics import adapter as ultralytics
from fxprune.datasets.calibration_facts import BatchFacts, count_boxes, describe_nonsense, look_at
from fxprune.demo.bundled import load_dataset, load_detector
from tests.helpers.models import pixels, tiny

OWN = BatchFacts(0, 4, True, confidence=0.9, boxes=(1, 0, 2, 3))
CLASSES = BatchFacts(0, 16, True, confidence=0.5, classes=frozenset({1, 2}))


@pytest.mark.parametrize(
    "facts",
    [
        OWN,
        CLASSES,
        replace(CLASSES, images=8, classes=frozenset({1})),  # too few to tell
        replace(CLASSES, low=-2.2, high=2.7),
        replace(OWN, own_targets=False, confidence=None, boxes=(1, 0, 0, 0)),  # the caller's labels are right
        replace(OWN, boxes=(60, 61, 60, 60)),
        replace(OWN, boxes=(3, 3, 3, 3)),
        replace(OWN, low=-0.1, high=1.1),
    ],
)
def test_nothing_is_said_of_ordinary_batches(facts: BatchFacts) -> None:
    assert describe_nonsense([facts], unit_images=facts.boxes is not None) == []


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (replace(OWN, high=255.0), "values from 0 to 255, .* floats in .0, 1. .*: divide"),
        (replace(OWN, low=-2.1, high=2.6), "values from -2.1 to 2.6"),
        (replace(OWN, plain=True), "all images of batch 0 are one plain colour"),
        (replace(OWN, confidence=0.02), "next to nothing in 4 images: the score of the surest box is 0.02.*weights"),
        (replace(OWN, confidence=0.0, boxes=(0, 0, 0, 0)), "next to nothing in 4 images. It looks untrained"),
        (replace(OWN, boxes=(100, 100, 100, 100)), "exactly 100 boxes in each of 4 images"),
        (replace(OWN, boxes=(0, 0, 0, 3)), "finds boxes in 1 of 4 images only"),
        (replace(OWN, own_targets=False, boxes=(0, 0, 0, 0)), "labels of 4 images have no box"),
        (replace(CLASSES, confidence=0.01), "classes for 16 images are little better than chance.*weights"),
        (replace(CLASSES, classes=frozenset({7})), "all 16 images the same class"),
    ],
)
def test_nonsense_is_said_once_with_its_cause_and_the_way_out(facts: BatchFacts, message: str) -> None:
    (text,) = describe_nonsense([facts], unit_images=True)
    assert re.search(message, text), text


def test_boxes_are_counted_over_all_batches() -> None:
    assert count_boxes([OWN, replace(OWN, index=1, own_targets=False)]) == {"boxes": 12, "images_with_boxes": 6}
    assert count_boxes([CLASSES]) == {}


def test_facts_of_a_batch_are_those_of_its_images_and_targets() -> None:
    targets = [{"boxes": torch.rand(count, 4), "labels": torch.ones(count).long()} for count in (2, 0)]
    given = look_at(3, Batch([torch.zeros(3, 4, 4), torch.rand(3, 4, 4) * 9], targets, 2), torchvision.ADAPTER)
    assert (given.index, given.boxes, given.low, given.plain) == (3, (2, 0), 0.0, False)
    assert given.high > 1
    colours = torch.tensor([0.1, 0.5, 0.9])[None, :, None, None].expand(2, 3, 4, 4)
    assert look_at(0, Batch(colours, torch.tensor([1, 1]), 2), classifier.ADAPTER).plain
    rows = {"cls": torch.ones(3, 1), "bboxes": torch.full((3, 4), 0.5), "batch_idx": torch.tensor([1.0, 1, 0])}
    yolo = Batch(torch.rand(2, 3, 8, 4), rows, 2)
    assert look_at(0, yolo, ultralytics.ADAPTER).boxes == (1, 2)
    found = ultralytics.true_boxes(yolo)
    assert found is not None
    assert found[0]["boxes"].tolist() == [[1, 2, 3, 6]]


# Whole analyses ------------------------------------------------------------------------------------------------------


def images(count: int = 4) -> list[Tensor]:
    return [load_dataset("calibration")[index][0] for index in range(count)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image * 255, "values from 0 to 255"),
        (lambda image: (image - 0.45) / 0.22, "values from -2"),
    ],
)
def test_detector_is_warned_of_images_out_of_range(change: Any, message: str) -> None:
    with pytest.warns(FxpruneWarning, match=message):
        fxprune.analyze(load_detector(), [[change(image) for image in images()]])


def test_detector_that_does_not_normalize_takes_any_range() -> None:
    model: Any = load_detector()
    model.transform.image_mean, model.transform.image_std = [0.0] * 3, [1.0] * 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxprune.analyze(model, [([image * 2 - 1 for image in images()], targets())])
    assert not [one for one in caught if issubclass(one.category, FxpruneWarning)]


def targets() -> list[dict[str, Tensor]]:
    return [load_dataset("calibration")[index][1] for index in range(4)]


def test_error_over_black_images_names_them_as_the_cause() -> None:
    with pytest.raises(LossError, match=r"no region received a gradient.*batch 0 are one plain colour"):
        fxprune.analyze(load_detector(), [[torch.zeros(3, 160, 160)] * 2])


def test_warning_is_given_once_by_a_search_and_names_the_black_batch() -> None:
    loader = [(pixels(4, 3, 16, 16), torch.arange(4)), (torch.zeros(4, 3, 16, 16), torch.arange(4))]
    with pytest.warns(FxpruneWarning) as caught:
        fxprune.compile(tiny(), loader, 0.2, strategy="search", tries=1, measure=False)
    said = [str(one.message) for one in caught if "plain" in str(one.message)]
    assert said == ["all images of batch 1 are one plain colour, black for example: scores on them mean nothing;"
                    " give real images"]  # fmt: skip


def test_untrained_classifier_without_labels_is_named() -> None:
    with pytest.warns(FxpruneWarning, match="all 16 images the same class"):
        fxprune.analyze(tiny(), [pixels(16, 3, 16, 16)])


def test_number_of_boxes_is_in_settings_and_report() -> None:
    plan = fxprune.analyze(load_detector(), [images()]).plan(0.1)
    boxes = plan.settings["boxes"]
    assert boxes > 4
    assert plan.settings["images_with_boxes"] == 4
    assert f"own confident outputs ({boxes} boxes in 4 of 4 images)" in " ".join(str(fxprune.report(plan)).split())


def test_exhausted_generator_is_named_as_the_cause() -> None:
    loader = iter([pixels(2, 3, 16, 16)])
    list(loader)
    with pytest.raises(fxprune.BatchError, match=r"no batch.*a generator is empty once it was read"):
        fxprune.analyze(tiny(), loader)
