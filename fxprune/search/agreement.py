"""How much of what a detector found a pruned version still finds; and who is to judge plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from fxprune.adapters.protocol import Adapter, Batch, confidence_threshold
from fxprune.datasets.evaluation import Boxes, average_precision, make_boxes
from fxprune.healing.loss_change import LossChange, to_be_run
from fxprune.runtime.distributed import all_gather

CONFIDENCE_THRESHOLD = 0.5
"""Score from which on what a detector finds is taken for true; half its best score, where that is less."""


class DetectionAgreement:
    """Judges pruned versions of a detector by what they still find: mAP, what it is sure of itself taken for the truth.

    A loss of a detector's own outputs can mislead: its parts are measured by their own sizes, and that of the boxes is
    next to nothing there, so that boxes a little off weigh as much as classes confused.

    Parameters
    ----------
    model, adapter, batches
        As of `LossChange`.
    """

    noise_std = 0.02

    def __init__(self, model: nn.Module, adapter: Adapter, batches: Sequence[tuple[int, Batch]]) -> None:
        self.adapter, self.batches = adapter, batches
        own = self._detect_boxes(model)
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
        found = self._detect_boxes(pruned)
        precision = average_precision(self.truth, found)["mAP"] if found is not None else 0.0
        return 1 / precision - 1 if precision > 0 else math.inf

    def _detect_boxes(self, model: nn.Module) -> list[Boxes] | None:
        """What a version finds on the images of all processes; None if that is not known as boxes."""
        with to_be_run(model, self.adapter) as network:
            outputs = [(index, self.adapter.detections(network, batch)) for index, batch in self.batches]
        own = [(index, None if rows is None else list(map(_to_boxes, rows))) for index, rows in outputs]
        found = sorted(itertools.chain(*all_gather(own)), key=lambda pair: pair[0])  # as one process has them
        return None if any(rows is None for _, rows in found) else [boxes for _, rows in found for boxes in rows]


def make_plan_judge(
    model: nn.Module, adapter: Adapter, batches: Sequence[tuple[int, Batch]], seed: int
) -> LossChange | DetectionAgreement:
    """Who is to judge plans: what is still found, of a detector of boxes that is sure of some; else the loss."""
    agreement = DetectionAgreement(model, adapter, batches)
    return agreement if agreement.is_applicable else LossChange(model, adapter, batches, seed)


def _to_boxes(output: dict[str, Any]) -> Boxes:
    known = output["scores"].isfinite() & output["boxes"].isfinite().all(1)
    return make_boxes(*(output[key][known] for key in ("boxes", "labels", "scores")))


def _keep_confident(boxes: Boxes, least: float) -> Boxes:
    keep = boxes.scores >= least
    ones = np.ones(int(keep.sum()))
    return Boxes(boxes.xywh[keep], boxes.labels[keep], ones, boxes.areas[keep], boxes.crowd[keep])
