"""How much of what a detector found a pruned version still finds; and who is to judge plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch, confidence_threshold
from fxprune.datasets.evaluation import Boxes, average_precision, make_boxes
from fxprune.healing.loss_change import LossChange
from fxprune.runtime.distributed import all_gather, raise_on_all_ranks

CONFIDENCE_THRESHOLD = 0.5
"""Score from which on what a detector finds is taken for true; half its best score, where that is less."""


class DetectionAgreement:
    """Judges pruned versions of a detector by what they still find: mAP, what it is sure of itself taken for the truth.

    A loss of a detector's own outputs can mislead: its parts are measured by their own sizes, and that of the boxes is
    next to nothing there, so that boxes a little off weigh as much as classes confused.

    Parameters
    ----------
    original, batches
        As of `LossChange`.
    """

    noise_std = 0.02

    def __init__(self, original: AdaptedModel, batches: Sequence[tuple[int, Batch]]) -> None:
        self.original, self.batches = original, batches
        own = self._detect_boxes(original)
        best = max((float(score) for boxes in own or () for score in boxes.scores), default=0.0)
        least = confidence_threshold(CONFIDENCE_THRESHOLD, best)
        self.truth = [_keep_confident(boxes, least) for boxes in own or ()]

    @property
    def is_applicable(self) -> bool:
        """Whether the model finds boxes, and nothing else that counts."""
        return any(len(boxes.labels) for boxes in self.truth)

    def to_settings(self, worse: float) -> dict[str, float]:
        """What a plan keeps of a judgement: the mAP."""
        return {"agreement": 1 / (1 + worse)}

    def increase(self, pruned: nn.Module) -> float:
        """Growth that stands for the mAP: of the share of what is found no longer to what still is."""
        found = self._detect_boxes(self.original.copy_version(pruned))
        precision = average_precision(self.truth, found)["mAP"] if found is not None else 0.0
        return 1 / precision - 1 if precision > 0 else math.inf

    def _detect_boxes(self, version: AdaptedModel) -> list[Boxes] | None:
        """What a version finds on the images of all processes; None if that is not known as boxes."""
        with version.running(grad=False), raise_on_all_ranks():
            outputs = [(index, version.detections(batch)) for index, batch in self.batches]
        own = [(index, None if rows is None else list(map(_to_boxes, rows))) for index, rows in outputs]
        found = sorted(itertools.chain(*all_gather(own)), key=lambda pair: pair[0])  # as one process has them
        return None if any(rows is None for _, rows in found) else [boxes for _, rows in found for boxes in rows]


PlanJudge = LossChange | DetectionAgreement
"""What compares pruned versions of a model with the model, by `increase`."""


def make_plan_judge(original: AdaptedModel, batches: Sequence[tuple[int, Batch]]) -> PlanJudge:
    """Choose what judges plans: the boxes still found, for a detector that is confident of some; else the loss."""
    agreement = DetectionAgreement(original, batches)
    return agreement if agreement.is_applicable else LossChange(original, batches)


def _to_boxes(output: dict[str, Any]) -> Boxes:
    known = output["scores"].isfinite() & output["boxes"].isfinite().all(1)
    return make_boxes(*(output[key][known] for key in ("boxes", "labels", "scores")))


def _keep_confident(boxes: Boxes, least: float) -> Boxes:
    keep = boxes.scores >= least
    ones = np.ones(int(keep.sum()))
    return Boxes(boxes.xywh[keep], boxes.labels[keep], ones, boxes.areas[keep], boxes.crowd[keep])
