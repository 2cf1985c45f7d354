"""Mend what a removal broke, from the calibration images alone: no labels, nothing that costs time at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.calibration import Calibration
from fxprune.detectors.batch import Batch
from fxprune.detectors.choice import choose_adapter, like_the_model, network_of
from fxprune.driver import plans_carried_out
from fxprune.errors import BatchError, SettingError
from fxprune.fits import fit_affine, fit_statistics
from fxprune.isolation import private_copy, untouched_randomness
from fxprune.mimicry import Schedule, copied, judge, mimic, points_of
from fxprune.pairs import Pair, pair_up
from fxprune.ranks import own_share, rank_and_world
from fxprune.refitting import refit
from fxprune.study import Progress


@dataclass(frozen=True)
class Care:
    """What a healing method works with: its settings, and where progress goes."""

    schedule: Schedule
    checkpoint: Path | None
    progress: Progress

    def told(self, stage: str, total: int | None) -> Callable[..., None]:
        """A function that counts: each call is one more done of a stage."""
        done = 0

        def count(*_: object) -> None:
            nonlocal done
            done += 1
            self.progress(stage, done, total)

        return count


def heal(
    pruned: nn.Module,
    original: nn.Module,
    calib_loader: Iterable[Any],
    method: str = "mimic",
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    steps: int = 400,
    learning_rate: float = 1e-3,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Bring a pruned model's features back to those of the model as it was, without labels.

    Parameters
    ----------
    pruned : Module
        What `fxprune.apply` or `fxprune.compile` returned. It is not changed.
    original : Module
        The model that was pruned, with the weights it had.
    calib_loader : iterable
        Batches as for `fxprune.analyze`; labels in them are not looked at. Read once.
    method : str
        ``"none"``; ``"norms"``: batch norms get the statistics of what now reaches them; ``"affine"``: weights, scales and
        shifts are fitted in closed form, layer after layer, to give what they gave; ``"mimic"``: that, then a short training.
    loss : callable, optional
        As for `fxprune.analyze`, for models of no known kind; only run, never minimized.
    steps, learning_rate, seed
        Of the training: AdamW, one batch a step, a cosine to zero. About a tenth of the batches is held out, and the
        weights that do best on these are returned.
    checkpoint : path, optional
        File that the training is kept in and, if it is there, goes on from.
    progress : callable, optional
        ``progress(stage, done, total)``.

    Returns
    -------
    Module
        A healed copy; mode, device and dtype are kept, its graphs and the shapes of its weights are the same.

    Raises
    ------
    SettingError
        If an option is not known, or the checkpoint is of another training.
    ModelError
        If `pruned` carries no plan, or is no version of `original`; names what differs.
    BatchError
        If a batch cannot be used.

    Notes
    -----
    In several processes (`torch.distributed`) every one gets the same loader and returns the same model: ``"norms"`` and
    ``"affine"`` share out the batches, the training the images of each batch.

    Feature mimicking for pruned blocks follows PRACTISE (CVPR 2023), re-estimated statistics EagleEye (ECCV 2020).

    Examples
    --------
    >>> pruned = fxprune.apply(model, analysis.plan(0.3))                  # doctest: +SKIP
    >>> healed = fxprune.heal(pruned, model, loader, method="affine")      # doctest: +SKIP
    """
    check_heal(method)
    network = network_of(pruned)
    islands = {node.island for plan in plans_carried_out(pruned) for node in plan.nodes}
    before = network_of(original)
    with untouched_randomness(network), torch.inference_mode(False), torch.no_grad():
        healed = private_copy(network, keep_precision=True)
        calibration = Calibration(calib_loader)
        adapter = choose_adapter(before, calibration.first_raw, loss)
        old, new = private_copy(before), private_copy(network)
        for twin in (old, new):
            adapter.prepare(twin)
        batches = list(calibration.images(old, adapter))
        if len(batches) < rank_and_world()[1]:
            raise BatchError(f"{len(batches)} batches cannot be shared by {rank_and_world()[1]} processes; give more")
        pair = pair_up(old, new, adapter, batches[0], islands)
        care = Care(
            Schedule(steps, learning_rate, seed), None if checkpoint is None else Path(checkpoint), progress or _silent
        )
        HEALERS[method](pair, batches, care)
        healed.load_state_dict(pair.pruned.state_dict())
    return like_the_model(pruned, healed)


def check_heal(method: object) -> None:
    """Raise `SettingError` unless a method is known."""
    if method not in HEALERS:
        raise SettingError(f"heal {method!r} is not known; known: {', '.join(HEALERS)}")


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


def _norms(pair: Pair, batches: Sequence[Batch], care: Care) -> None:
    refit(pair, own_share(batches), fit_statistics, care.told("norms", None))


def _affine(pair: Pair, batches: Sequence[Batch], care: Care) -> None:
    refit(pair, own_share(batches), fit_affine, care.told("affine", None))


def _mimic(pair: Pair, batches: Sequence[Batch], care: Care) -> None:
    points, before = points_of(pair), copied(pair.pruned)
    found = judge(pair, points, batches)
    _affine(pair, batches, care)
    if not judge(pair, points, batches) < found:
        pair.pruned.load_state_dict(before)
    mimic(pair, batches, care.schedule, care.checkpoint, lambda step, steps: care.progress("mimic", step, steps))


HEALERS: dict[str, Callable[[Pair, Sequence[Batch], Care], None]] = {
    "none": lambda pair, batches, care: None,
    "norms": _norms,
    "affine": _affine,
    "mimic": _mimic,
}
"""Methods of healing by name."""
