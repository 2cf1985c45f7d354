"""Judges plans: by the boxes that a pruned detector still finds, or by the loss of any other model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import nn

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch
from fxprune.datasets.agreement import confident_boxes, to_boxes
from fxprune.datasets.evaluation import Boxes, average_precision
from fxprune.healing.loss_change import LossChange
from fxprune.runtime.distributed import all_gather, raise_on_all_ranks


class DetectionAgreement:
    """Computes the mAP of pruned versions of a detector; the ground truth is the original's own confident boxes.

    The loss on the detector's own outputs can be misleading. Its parts are divided by their own sizes, and the size of
    the box part is almost 0 there. So small errors of boxes would count as much as wrong classes.

    Parameters
    ----------
    original, batches
        As for `LossChange`.
    """

    noise_std = 0.02
    """Standard deviation of a plan's ``log(1 + increase)`` around the sum of the effects of its regions."""

    def __init__(self, original: AdaptedModel, batches: Sequence[tuple[int, Batch]]) -> None:
        self.original, self.batches = original, batches
        self.truth = confident_boxes(self._detect_boxes(original) or [])

    @property
    def is_applicable(self) -> bool:
        """Whether the model outputs only boxes, and is confident of some of them."""
        return any(len(boxes.labels) for boxes in self.truth)

    def to_settings(self, worse: float) -> dict[str, float]:
        """Return the entry of the plan's settings for an increase: the mAP."""
        return {"agreement": 1 / (1 + worse)}

    def increase(self, pruned: nn.Module) -> float:
        """Return ``1 / mAP - 1`` of a pruned version, so lost / kept precision; infinite for a mAP of 0."""
        boxes = self._detect_boxes(self.original.copy_version(pruned))
        precision = average_precision(self.truth, boxes)["mAP"] if boxes is not None else 0.0
        return 1 / precision - 1 if precision > 0 else math.inf

    def _detect_boxes(self, version: AdaptedModel) -> list[Boxes] | None:
        """Return the boxes of a version on the images of all processes; None if it does not output boxes only."""
        with version.running(grad=False), raise_on_all_ranks():
            own = [(index, _find_boxes_only(version, batch)) for index, batch in self.batches]
        every = sorted(itertools.chain(*all_gather(own)), key=lambda pair: pair[0])  # the order of a single process
        return None if any(rows is None for _, rows in every) else [boxes for _, rows in every for boxes in rows]


PlanJudge = LossChange | DetectionAgreement
"""Compares pruned versions of a model with the original; `increase` returns larger numbers for worse versions."""


def make_plan_judge(original: AdaptedModel, batches: Sequence[tuple[int, Batch]]) -> PlanJudge:
    """Return the judge of plans: `DetectionAgreement` for a detector with confident boxes, else `LossChange`."""
    agreement = DetectionAgreement(original, batches)
    return agreement if agreement.is_applicable else LossChange(original, batches)


def _find_boxes_only(version: AdaptedModel, batch: Batch) -> list[Boxes] | None:
    """Return the boxes in a batch; None if the model outputs no boxes, or more than boxes."""
    rows = version.detections(batch)
    if rows is None or any(set(row) != {"boxes", "labels", "scores"} for row in rows):
        return None
    return [to_boxes(row) for row in rows]
