"""What compile measures at its end: on which images, against what, and that nothing else changes by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.demo.bundled import load_dataset, load_detector
from fxprune.search import measurement
from tests.helpers.hostile import assert_unchanged
from tests.helpers.models import labelled, pixels, squared, tiny


def measured(pruned: nn.Module) -> Any:
    return fxprune.report(pruned).settings.get("measured")


def many(batches: int = 9, count: int = 16) -> list[tuple[Tensor, Tensor]]:
    return [(pixels(count, 3, 16, 16, seed=seed), torch.arange(count) % 5) for seed in range(batches)]


def test_every_eighth_batch_is_held_out_of_scores_and_healing() -> None:
    loader = many()
    pruned = fxprune.compile(tiny(), loader, 0.3)
    found, settings = measured(pruned), fxprune.report(pruned).settings
    assert (found["source"], found["images"]) == ("held out", 16)
    assert (settings["images"], settings["heal"]["images"]) == (128, 128)
    rest = [batch for index, batch in enumerate(loader) if index != 7]
    alone = fxprune.compile(tiny(), rest, 0.3, measure=False)
    assert all(torch.equal(one, other) for one, other in zip(pruned.parameters(), alone.parameters(), strict=True))
    assert found["agreement"]["share"] == fxprune.agreement(tiny(), pruned, [loader[7]]).share


def test_few_images_are_used_again_and_the_report_says_so() -> None:
    model = tiny()
    with assert_unchanged(model):
        pruned = fxprune.compile(model, labelled(), 0.3)
    found = measured(pruned)
    assert (found["source"], found["images"]) == ("calibration", 4)
    assert fxprune.report(pruned).settings["images"] == 4
    assert found["latency"]["images"] == 2
    assert found["latency"]["before_ms"] > 0
    assert "4 images that pruning used too" in str(fxprune.report(pruned))


def test_images_given_are_measured_on_and_none_is_held_out() -> None:
    given = [pixels(3, 3, 16, 16, seed=99)]
    pruned = fxprune.compile(tiny(), many(), 0.3, measure=iter(given))
    found = measured(pruned)
    assert (found["source"], found["images"]) == ("given", 3)
    assert "quality" not in found
    assert fxprune.report(pruned).settings["images"] == 144


def test_nothing_is_measured_if_not_wanted_and_batches_are_then_read_one_by_one() -> None:
    alive: list[int] = []

    def draw() -> Iterator[Any]:
        for number, batch in enumerate(labelled(2, 4)):
            alive.append(number)
            yield batch

    stages: list[tuple[int, int]] = []
    pruned = fxprune.compile(
        tiny(),
        draw(),
        0.3,
        heal="none",
        measure=False,
        progress=lambda stage, done, _: stages.append((len(alive), done)),
    )
    assert measured(pruned) is None
    assert (1, 0) in stages
    assert "Nothing was measured" in str(fxprune.report(pruned))


def test_labels_give_accuracy_and_map() -> None:
    quality = measured(fxprune.compile(tiny(), labelled(), 0.3))["quality"]
    hits = torch.cat([tiny()(images).argmax(1) == labels for images, labels in labelled()])
    assert quality["name"] == "accuracy"
    assert quality["before"] == float(hits.double().mean())
    model = load_detector()
    loader = fxprune.batches(model, load_dataset("val"), batch_size=4)[:2]
    found = measured(fxprune.compile(model, loader, 0.1, heal="none"))
    assert found["quality"]["name"] == "mAP"
    assert 0.5 < found["quality"]["after"] <= 1
    assert found["agreement"] == vars(
        fxprune.agreement(model, fxprune.compile(model, loader, 0.1, heal="none"), loader)
    )


def test_map_of_a_batch_is_that_of_evaluate() -> None:
    model, some = load_detector(), torch.utils.data.Subset(load_dataset("val"), range(8))
    found = measured(fxprune.compile(model, fxprune.batches(model, some), 0.1, heal="none"))
    assert found["quality"]["before"] == pytest.approx(fxprune.evaluate(model, some)["mAP"], abs=1e-6)


def test_failure_is_noted_and_the_pruned_model_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(fxprune.compile(tiny(), labelled(), 0.3, loss=squared))
    assert "agreement is known for detectors" in found["agreement"]["failed"]
    assert found["latency"]["rounds"] > 0

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory\nat line 3")

    monkeypatch.setattr(measurement, "compare_latency", broken)
    pruned = fxprune.compile(tiny(), labelled(), 0.3)
    assert measured(pruned)["latency"] == {"failed": "RuntimeError: out of memory"}
    assert "Not measured: latency (RuntimeError: out of memory)." in " ".join(str(fxprune.report(pruned)).split())


def test_measurement_survives_files_and_ends_with_the_next_healing(tmp_path: Path) -> None:
    model = tiny()
    pruned = fxprune.compile(model, labelled(), 0.3)
    fxprune.save(pruned, tmp_path / "pruned")
    assert measured(fxprune.load(tiny(), tmp_path / "pruned")) == measured(pruned)
    (plan,) = fxprune.report(pruned).plans
    assert measured(fxprune.apply(model, plan)) is None
    assert measured(fxprune.heal(pruned, model, labelled(), "affine")) is None
    assert "heal" in fxprune.report(pruned).settings


def test_plan_that_was_never_applied_says_so(plan: fxprune.Plan) -> None:
    assert "Nothing is measured yet: this plan was not applied." in str(fxprune.report(plan))


@pytest.mark.parametrize("measure", ["yes", 3, None, pixels(2, 3, 16, 16)])
def test_measure_that_is_no_choice_and_no_loader_is_refused(measure: Any) -> None:
    with pytest.raises(fxprune.BatchError, match="measure must be an iterable of batches"):
        fxprune.compile(tiny(), labelled(), measure=measure)
