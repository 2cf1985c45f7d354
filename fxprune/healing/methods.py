"""Methods of healing: what each does to a pruned model, how far it goes, and what it notes of that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fxprune.adapters.protocol import Batch
from fxprune.healing.distillation.feature_distance import Distance
from fxprune.healing.distillation.feature_mimic import can_be_shared, check_images, mimic, pieces, split
from fxprune.healing.distillation.schedule import Schedule, copied
from fxprune.healing.loss_change import Judge
from fxprune.healing.reconstruction.layerwise import refit
from fxprune.healing.reconstruction.least_squares import QUICK, fit_affine
from fxprune.healing.saliency import Maps, saliency_maps
from fxprune.healing.teacher_student import Pair
from fxprune.runtime.distributed import by_first, dealt_out, failing_together, own_share, rank_and_world
from fxprune.runtime.json_text import finite
from fxprune.runtime.progress import Progress, unheard

Note = dict[str, Any]
Numbered = tuple[int, Batch]  # a batch, or a piece of one, with the batch's number
BLENDS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""How far to go from the weights as they were to those that were fitted or trained; held-out images decide."""


@dataclass(frozen=True)
class Care:
    """What a healing method works with: its settings, where progress goes, whether to judge and note what it did, and
    the saliency of this process's batches once it is known, which serves other cuts of the same model too."""

    schedule: Schedule = field(default_factory=Schedule)
    progress: Progress = unheard
    thorough: bool = False
    saliency: list[Maps] = field(default_factory=list)

    def told(self, stage: str, total: int | None) -> Callable[..., None]:
        """A function that counts: each call is one more done of a stage."""
        counted = itertools.count(1)
        return lambda *_: self.progress(stage, next(counted), total)


class Healing:
    """A pruned model that is being healed, from some images, and judged by others.

    Parameters
    ----------
    pair : Pair
        Its pruned model is changed.
    batches : sequence of Batch
        As the adapter runs them; the same in all processes.
    care : Care

    Attributes
    ----------
    learnt, held : list of (int, Batch)
        What is learnt from (all where that is too little), and what is held out to judge by.
    start : dict
        The weights as they were.
    """

    def __init__(self, pair: Pair, batches: Sequence[Batch], care: Care) -> None:
        self.pair, self.batches, self.care = pair, batches, care
        whole = [(index, piece) for index, batch in enumerate(batches) for piece in pieces(batch)]
        self.held, learnt = split(whole)
        self.learnt = learnt if len(learnt) >= rank_and_world()[1] else list(enumerate(batches))
        self.start = copied(pair.pruned)

    @cached_property
    def distance(self) -> Distance:
        """How far features are off, by their variances in what is learnt from."""
        return Distance(self.pair, [piece for _, piece in self.learnt])

    @cached_property
    def judge(self) -> Judge:
        """Who takes the loss on what is held out."""
        pair, own = self.pair, own_share(self.held)
        labelled = [(index, pair.adapter.label(pair.original, piece)) for index, piece in own]
        return Judge(pair.original, pair.adapter, labelled, self.care.schedule.seed)

    def far(self) -> float:
        """How far features are off on what is held out; no number where processes cannot share that out."""
        held = [piece for _, piece in self.held]
        shared = all(can_be_shared(piece) for _, piece in [*self.learnt, *self.held])
        return self.distance.mean(held) if shared else math.nan

    def fit(self, batches: Sequence[Numbered]) -> None:
        """Fit layer after layer, salient places counting for more."""
        own, care = own_share(batches), self.care
        if not care.saliency:
            with failing_together():
                seed = care.schedule.seed
                care.saliency.extend(saliency_maps(self.pair, batch, index, seed) for index, batch in own)
        fit = fit_affine if care.thorough else partial(fit_affine, effort=QUICK)
        refit(self.pair, [batch for _, batch in own], fit, care.told("affine", None), care.saliency)

    def blend(self) -> Note:
        """Go from the weights as they were to those that there are as far as brings the loss nearest to what it was.

        Returns how far that is, and how far off the loss was and is then, see `Judge.astray`.
        """
        end, losses = copied(self.pair.pruned), {}
        for share in BLENDS:
            self.pair.pruned.load_state_dict(_between(self.start, end, share))
            losses[share] = self.judge.astray(self.pair.pruned)
        best = min(BLENDS, key=losses.__getitem__)
        self.pair.pruned.load_state_dict(_between(self.start, end, best))
        return {"share": best, "loss": finite({"before": losses[BLENDS[-1]], "after": losses[best]})}


def carry_out(method: str, healing: Healing) -> Note:
    """Heal, and say what was done and how far features were and are from the original's, on images held out."""
    begin, thorough = perf_counter(), healing.care.thorough
    before = healing.far() if thorough else math.nan
    done = HEALERS[method](healing)
    after = healing.far() if thorough else math.nan
    return {
        "method": method,
        "images": sum(batch.count for batch in healing.batches),
        **done,
        "distance": finite({"before": before, "after": after}),
        "seconds": by_first(lambda: round(perf_counter() - begin, 1)),
    }


def _affine(healing: Healing) -> Note:
    if not healing.care.thorough:
        healing.fit(list(enumerate(healing.batches)))
        return {}
    healing.fit(healing.learnt)
    return healing.blend()


def _mimic(healing: Healing) -> Note:
    check_images(healing.batches)
    healing.fit(healing.learnt)
    healing.blend()
    care = healing.care
    learnt, held = ([piece for _, piece in part] for part in (healing.learnt, healing.held))
    saliency = dealt_out(care.saliency, len(learnt))
    mimic(healing.distance, learnt, held, care.schedule, partial(care.progress, "mimic"), saliency)
    return {**healing.blend(), "steps": care.schedule.steps}


def _between(start: dict[str, Any], end: dict[str, Any], share: float) -> dict[str, Any]:
    real = {name for name, value in end.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: torch.lerp(start[name], value, share) if name in real else value for name, value in end.items()}


HEALERS: dict[str, Callable[[Healing], Note]] = {
    "none": lambda healing: {},
    "affine": _affine,
    "mimic": _mimic,
}
"""Methods of healing by name."""
