"""Judges of plans: the share of boxes that are still found, or the loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.adapters import classifier, torchvision
from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch
from fxprune.adapters.registry import choose_adapter
from fxprune.adapters.ultralytics import adapter as ultralytics
from fxprune.datasets.agreement import CONFIDENCE_THRESHOLD
from fxprune.datasets.evaluation import Boxes
from fxprune.demo.bundled import load_dataset, load_detector
from fxprune.healing.loss_change import LossChange
from fxprune.search.judges import DetectionAgreement, make_plan_judge
from tests.helpers.models import labelled, pixels, tiny


def images(count: int) -> list[Tensor]:
    dataset = load_dataset("calibration")
    return [dataset[index][0] for index in range(count)]


def judged(count: int = 6) -> tuple[nn.Module, DetectionAgreement]:
    model = load_detector()
    rows = images(count)
    batches = [Batch(rows[:4], None, 4), Batch(rows[4:], None, count - 4)]
    judge = make_plan_judge(AdaptedModel.copy_of(model, torchvision.ADAPTER), list(enumerate(batches)))
    assert isinstance(judge, DetectionAgreement)
    return model, judge


def test_agreement_is_one_with_itself_and_less_after_pruning() -> None:
    model, judge = judged()
    assert all((boxes.scores >= CONFIDENCE_THRESHOLD).all() for boxes in judge.truth)
    assert judge.increase(model) == 0.0
    assert judge.to_settings(0.0) == {"agreement": 1.0}
    worse = [judge.increase(fxprune.compile(model, [images(4)], budget, heal="none")) for budget in (0.05, 0.4)]
    assert 0 <= worse[0] < worse[1] < math.inf
    assert judge.to_settings(0.25) == {"agreement": 0.8}


def test_model_without_detections_or_with_nan_is_worst() -> None:
    _, judge = judged()
    broken = load_detector()
    with torch.no_grad():
        for weight in broken.parameters():
            weight.fill_(math.nan)
    assert judge.increase(broken) == math.inf


def test_agreement_of_unsure_detector_uses_the_surer_half(monkeypatch: pytest.MonkeyPatch) -> None:
    def boxes(*scores: float) -> Boxes:
        count = len(scores)
        ones, none = np.ones(count), np.zeros(count, dtype=bool)
        return Boxes(np.ones((count, 4)), np.ones(count, dtype=np.int64), np.array(scores), ones, none)

    monkeypatch.setattr(
        DetectionAgreement, "_detect_boxes", lambda self, model: [boxes(0.2, 0.11, 0.09), boxes(), boxes(0.05)]
    )
    judge = DetectionAgreement(AdaptedModel(nn.Identity(), torchvision.ADAPTER), [])
    assert [len(found.labels) for found in judge.truth] == [2, 0, 0]
    assert CONFIDENCE_THRESHOLD > 0.2


def test_make_plan_judge_uses_the_loss_for_models_without_plain_boxes() -> None:
    (x, y), *_ = labelled()
    original = AdaptedModel(tiny(), classifier.ADAPTER)
    assert isinstance(make_plan_judge(original, [(0, Batch(x, y, len(x)))]), LossChange)

    class Masks(nn.Module):
        def forward(self, rows: list[Tensor]) -> list[dict[str, Tensor]]:
            found = {"boxes": torch.ones(1, 4), "labels": torch.ones(1).long(), "scores": torch.ones(1)}
            return [{**found, "masks": torch.ones(1, 1, 8, 8)} for _ in rows]

    (found, _) = torchvision.detections(Masks(), Batch(images(2), None, 2)) or []
    assert "masks" in found
    empty: Any = DetectionAgreement(AdaptedModel(Masks(), torchvision.ADAPTER), [(0, Batch(images(2), None, 2))])
    assert not empty.is_applicable


@pytest.mark.parametrize(("name", "boxes_alone"), [("yolov8n", True), ("yolov8n-seg", False)])
def test_boxes_of_a_batch_equal_boxes_of_its_images(name: str, boxes_alone: bool) -> None:
    models: Any = pytest.importorskip("ultralytics.nn.tasks")
    kind = models.DetectionModel if boxes_alone else models.SegmentationModel
    torch.manual_seed(0)
    model = kind(f"{name}.yaml", nc=3, verbose=False).eval()
    batch = pixels(2, 3, 64, 64)
    found = ultralytics.detections(model, Batch(batch, None, 2))
    assert found is not None
    wanted = ultralytics.detect(model, list(batch), 64)
    for one, other in zip(found, wanted, strict=True):
        assert (one.keys() == other.keys()) is boxes_alone
        assert torch.equal(one["scores"], other["scores"])
        assert torch.equal(one["labels"], other["labels"])


def test_search_of_a_detector_reports_agreement() -> None:
    model = load_detector()
    loader = [images(8)[:4], images(8)[4:]]
    pruned = fxprune.compile(model, loader, 0.2, strategy="search", tries=2, heal="none")
    report = fxprune.report(pruned)
    (plan,) = report.plans
    adapter = choose_adapter(model, loader[1], None)
    judge = DetectionAgreement(AdaptedModel.copy_of(model, adapter), [(0, Batch(loader[1], None, 4))])
    assert plan.settings["agreement"] == pytest.approx(judge.to_settings(judge.increase(pruned))["agreement"])
    assert "loss_increase" not in plan.settings
    words = " ".join(str(report).split())
    assert "2 plans tried" in words
    assert "boxes of the original model" in words
