"""How much worse a pruned model is, by its loss or by the boxes it finds: the judges of plans and of healings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.calibration import take_loss
from fxprune.criteria import part_sizes
from fxprune.detectors.batch import Adapter, Batch, confidence_threshold, device_of
from fxprune.detectors.choice import network_of
from fxprune.errors import LossError
from fxprune.evaluation import Boxes, average_precision, make_boxes
from fxprune.isolation import private_copy, untouched_randomness
from fxprune.ranks import failing_together, gathered, on_device

SURE = 0.5
"""Score from which on what a detector finds is taken for true; half its best score, where that is less."""


class Judge:
    """Takes the loss of pruned versions of a model.

    Parameters
    ----------
    model : Module
        As it was.
    adapter : Adapter
    batches : sequence of (int, Batch)
        This process's share of the images, with targets and with their numbers among all.
    seed : int
        For samplers inside the loss.
    """

    noise = 0.05
    """Standard deviation of what sums of single damages leave unexplained, in the logarithm of what has grown."""

    def __init__(self, model: nn.Module, adapter: Adapter, batches: Sequence[tuple[int, Batch]], seed: int) -> None:
        self.adapter, self.batches, self.seed = adapter, batches, seed
        self.before = self.parts(model)
        size = self._mean(self.before)
        self.size = part_sizes(size) if len(size) > 1 else size.abs().clamp_min(1.0)

    def note(self, worse: float) -> dict[str, float]:
        """What a plan keeps of a judgement."""
        return {"loss_increase": worse}

    def worse(self, pruned: nn.Module) -> float:
        """How much the parts of the loss have grown, relative to their own sizes, summed; infinite where one breaks.

        A loss of a single part is relative to 1 at least: that of a model sure of its own labels is next to nothing.
        """
        return self._compared(pruned, lambda change: change)

    def astray(self, pruned: nn.Module) -> float:
        """How far the parts of the loss are off, batch by batch, more or less alike; else as `worse`.

        It is least where a model does what it did, which the loss itself need not be.
        """
        return self._compared(pruned, torch.abs)

    def parts(self, model: nn.Module) -> list[Tensor]:
        """Parts (P,) of the loss of each batch."""
        with _to_be_run(model, self.adapter) as network:
            return [
                take_loss(network, self.adapter, batch, index, self.seed).double().cpu()
                for index, batch in self.batches
            ]

    def _compared(self, pruned: nn.Module, count: Callable[[Tensor], Tensor]) -> float:
        try:
            after = self.parts(pruned)
        except LossError:
            return math.inf
        changes = [count((new - old) / self.size) for new, old in zip(after, self.before, strict=True)]
        return float(self._mean(changes).sum())

    def _mean(self, rows: Sequence[Tensor]) -> Tensor:
        """Mean over the images of all processes."""
        sums = [batch.count * row for (_, batch), row in zip(self.batches, rows, strict=True)]
        own = sum(sums, torch.zeros((), dtype=torch.float64)), sum(batch.count for _, batch in self.batches)
        totals, counts = zip(*gathered(own), strict=True)
        mean: Tensor = sum(totals) / sum(counts)
        return mean


class Agreement:
    """Judges pruned versions of a detector by what they still find: mAP, what it is sure of itself taken for the truth.

    A loss of a detector's own outputs can mislead: its parts are measured by their own sizes, and that of the boxes is
    next to nothing there, so that boxes a little off weigh as much as classes confused.

    Parameters
    ----------
    model, adapter, batches
        As of `Judge`.
    """

    noise = 0.02

    def __init__(self, model: nn.Module, adapter: Adapter, batches: Sequence[tuple[int, Batch]]) -> None:
        self.adapter, self.batches = adapter, batches
        own = self._found(model)
        best = max((float(score) for boxes in own or () for score in boxes.scores), default=0.0)
        least = confidence_threshold(SURE, best)
        self.truth = [_sure(boxes, least) for boxes in own or ()]

    @property
    def possible(self) -> bool:
        """Whether the model finds boxes, and nothing else that counts."""
        return any(len(boxes.labels) for boxes in self.truth)

    def note(self, worse: float) -> dict[str, float]:
        """What a plan keeps of a judgement: the mAP."""
        return {"agreement": 1 / (1 + worse)}

    def worse(self, pruned: nn.Module) -> float:
        """Growth that stands for the mAP: of the share of what is found no longer to what still is."""
        found = self._found(pruned)
        precision = average_precision(self.truth, found)["mAP"] if found is not None else 0.0
        return 1 / precision - 1 if precision > 0 else math.inf

    def _found(self, model: nn.Module) -> list[Boxes] | None:
        """What a version finds on the images of all processes; None if that is not known as boxes."""
        with _to_be_run(model, self.adapter) as network:
            outputs = [(index, self.adapter.found(network, batch)) for index, batch in self.batches]
        own = [(index, None if rows is None else list(map(_boxes, rows))) for index, rows in outputs]
        found = sorted(itertools.chain(*gathered(own)), key=lambda pair: pair[0])  # as one process has them
        return None if any(rows is None for _, rows in found) else [boxes for _, rows in found for boxes in rows]


def judge_of(model: nn.Module, adapter: Adapter, batches: Sequence[tuple[int, Batch]], seed: int) -> Judge | Agreement:
    """Who is to judge plans: what is still found, of a detector of boxes that is sure of some; else the loss."""
    agreement = Agreement(model, adapter, batches)
    return agreement if agreement.possible else Judge(model, adapter, batches, seed)


@contextmanager
def _to_be_run(model: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """A private copy of a version, ready to be run without gradients by all processes together."""
    network = private_copy(network_of(model))
    adapter.prepare(network)
    with (
        on_device(device_of(network)),
        untouched_randomness(network),
        torch.inference_mode(False),
        torch.no_grad(),
        failing_together(),
    ):
        yield network


def _boxes(output: dict[str, Any]) -> Boxes:
    known = output["scores"].isfinite() & output["boxes"].isfinite().all(1)
    return make_boxes(*(output[key][known] for key in ("boxes", "labels", "scores")))


def _sure(boxes: Boxes, least: float) -> Boxes:
    keep = boxes.scores >= least
    ones = np.ones(int(keep.sum()))
    return Boxes(boxes.xywh[keep], boxes.labels[keep], ones, boxes.areas[keep], boxes.crowd[keep])
