"""Healing with labels: ``heal="mimic_labelled"``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.adapters.registry import choose_adapter
from fxprune.errors import BatchError
from fxprune.healing.distillation.feature_distance import FeatureDistance
from fxprune.healing.distillation.labelled_distance import LabelledDistance
from fxprune.healing.teacher_student import TeacherStudent, pair_models
from fxprune.planning.analysis import Analysis
from fxprune.runtime.private_copy import private_copy
from fxprune.search import compile as compile_module
from tests.helpers.healing import Chain, equal, images, tiny_with_statistics, without
from tests.helpers.hostile import assert_refused, assert_unchanged
from tests.helpers.models import Detector, build, labelled, pixels, tiny

METHOD = "mimic_labelled"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_with_statistics()


@pytest.fixture(scope="module")
def cut(model: nn.Module, analysis: Analysis) -> nn.Module:
    return fxprune.apply(model, without(analysis, "blocks.0", "blocks.2"))


def bright(batches: int = 9, count: int = 4, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images whose label is the brightest of the three channels."""
    found = []
    for seed in range(first, first + batches):
        label = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
        image = pixels(count, 3, 16, 16, seed=seed) + functional.one_hot(label, 3)[:, :, None, None]
        found.append((image, label))
    return found


def task_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(functional.cross_entropy(model(x), y)) for x, y in batches) / len(batches)


def pair_and_batches(model: nn.Module, cut: nn.Module) -> tuple[TeacherStudent, list[Any]]:
    old, new, raws = private_copy(model), private_copy(cut), bright(3)
    adapter = choose_adapter(old, raws[0], None)
    read = [adapter.normalize(old, raw) for raw in raws]
    return pair_models(old, new, adapter, read[0], [""]), read


def test_mimic_labelled_has_less_loss_on_new_labels_than_mimic(model: nn.Module, cut: nn.Module) -> None:
    with assert_unchanged(model), assert_unchanged(cut):
        healed = {name: fxprune.heal(cut, model, bright(), name, steps=60) for name in ("mimic", METHOD)}
    new = bright(4, first=50)
    assert task_loss(healed[METHOD], new) < task_loss(healed["mimic"], new) - 0.05
    assert task_loss(healed[METHOD], new) < task_loss(model, new)


def test_mimic_labelled_is_noted_and_explained(model: nn.Module, cut: nn.Module) -> None:
    healed = fxprune.heal(cut, model, bright(), METHOD, steps=60)
    report = fxprune.report(healed)
    note: Any = report.settings["heal"]
    assert (note["method"], note["labels"], note["steps"]) == (METHOD, True, 60)
    assert note["loss"]["after"] < min(0.0, note["loss"]["before"])  # less than the loss of the original
    assert "by their labels" in " ".join(str(report).split())
    without_labels: Any = fxprune.report(fxprune.heal(cut, model, bright(), "mimic", steps=1)).settings["heal"]
    assert without_labels["labels"] is False


def test_labelled_distance_is_the_distance_plus_the_scaled_task_loss(model: nn.Module, cut: nn.Module) -> None:
    pair, (first, second, third) = pair_and_batches(model, cut)
    distance = FeatureDistance(pair, [first, second])
    objective = LabelledDistance(distance, [third])
    ratio = distance.mean([third]) / task_loss(pair.student, [(third.images, third.targets)])
    with torch.no_grad():
        mirrored = torch.tensor([True, False, True, False])
        expected = distance(first, None, mirrored) + ratio * task_loss(pair.student, [(first.images, first.targets)])
        torch.testing.assert_close(objective(first, None, mirrored), expected, rtol=1e-6, atol=0)
    assert objective.mean([third]) == pytest.approx(2 * distance.mean([third]), rel=1e-6)


def test_compile_heals_with_labels(model: nn.Module) -> None:
    pruned = fxprune.compile(model, bright(), 0.3, heal=METHOD, steps=30)
    again = fxprune.compile(model, bright(), 0.3, heal=METHOD, steps=30)
    assert equal(pruned, again)
    assert task_loss(pruned, bright(4, first=50)) < task_loss(model, bright(4, first=50))


def test_mimic_labelled_takes_the_loss_of_the_caller() -> None:
    model = build(Detector)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(network(batch[0]), batch[1])

    pruned = fxprune.compile(model, bright(), 0.2, heal="none", loss=loss)
    healed = fxprune.heal(pruned, model, bright(), METHOD, loss=loss, steps=60)
    assert task_loss(healed, bright(4, first=50)) < task_loss(model, bright(4, first=50))


# Bad input -----------------------------------------------------------------------------------------------------------


def test_heal_names_the_batch_without_labels(model: nn.Module, cut: nn.Module) -> None:
    with assert_refused(cut, BatchError, "batch 2 has no labels.*heal='mimic'"):
        fxprune.heal(cut, model, [*labelled(), *images(1)], METHOD)


def test_compile_names_the_batch_without_labels_before_its_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "find_plan", None)
    network = tiny()
    with assert_refused(network, BatchError, "batch 2 has no labels.*heal='mimic'"):
        fxprune.compile(network, [*labelled(), *images(1)], heal=METHOD)


def test_heal_names_the_batch_whose_labels_the_model_does_not_know(model: nn.Module, cut: nn.Module) -> None:
    *batches, (x, y) = labelled(8, 3)
    known = [(x, y % 5) for x, y in batches]
    with assert_refused(cut, BatchError, "batch 2: labels run from 2 to 5, the model knows 0 to 4"):
        fxprune.heal(cut, model, [*known, (x, y)], METHOD)


def test_labelled_distance_without_a_task_loss_is_the_distance() -> None:
    model = build(Chain)
    pruned = fxprune.compile(
        model, labelled(), 0.01, heal="none", criterion=lambda region, _: float(region.name != "middle")
    )
    zero: Any = lambda network, batch: 0 * network(batch).sum()  # noqa: E731
    options: dict[str, Any] = {"loss": zero, "steps": 3}
    assert equal(*(fxprune.heal(pruned, model, images(9), name, **options) for name in ("mimic", METHOD)))
