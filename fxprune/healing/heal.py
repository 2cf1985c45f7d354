"""Mend what a removal broke, from the calibration images alone: no labels, nothing that costs time at inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Batch, device_of
from fxprune.adapters.registry import choose_adapter, like_the_model, network_of
from fxprune.datasets.calibration import Calibration, check_same
from fxprune.errors import FxpruneWarning, ModelError
from fxprune.healing.distillation.schedule import Schedule
from fxprune.healing.methods import HEALERS, Care, Healing, Note, carry_out
from fxprune.healing.teacher_student import Pair, pair_up
from fxprune.planning.plan import Plan
from fxprune.rewriting.apply import traced_island
from fxprune.rewriting.history import SPARED, alterations, plans_carried_out, plans_of, remember
from fxprune.runtime.distributed import check_shareable, failing_together, on_device, overwrite_by_first, rank_and_world
from fxprune.runtime.options import check_choice, refuse_removed_keywords
from fxprune.runtime.private_copy import check_same_weights, private_copy, untouched_randomness
from fxprune.runtime.progress import Progress, unheard

Loss = Callable[[nn.Module, Any], Tensor]
LOST = 1.0
"""How far off the loss on these is left that is told: as far as if one part of it had doubled."""


@refuse_removed_keywords
def heal(
    pruned: nn.Module,
    original: nn.Module,
    calib_loader: Iterable[Any],
    method: str = "mimic",
    *,
    loss: Loss | None = None,
    steps: int = 400,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Bring a pruned model's features back to what they were, without labels and at no cost at inference.

    Parameters
    ----------
    pruned, original : Module
        What `fxprune.apply` or `fxprune.compile` returned, and what they were given. Neither is changed.
    calib_loader, loss
        As for `fxprune.analyze`. Labels are not looked at, a loss is run and never minimized.
    method : str
        ``"none"``; ``"affine"``: weights, scales and shifts are fitted in closed form, layer after layer, to the
        outputs of the original, salient places counting for more (`fxprune.healing.saliency`); ``"mimic"``: that, then
        a short training (`fxprune.healing.distillation.feature_mimic`). Both hold out an eighth of the images; how far
        to go from the weights as they were, if at all, is decided by the loss there: it should be near to the
        original's.
    steps, learning_rate, seed
        Of the training: four images a step, `learning_rate` at most, less where that would harm.
    progress : callable, optional
        ``progress(stage, done, total)``.

    Returns
    -------
    Module
        A healed copy; mode, device, dtype, graphs, shapes are those of `pruned`. Its last plan's ``settings["heal"]``
        says how, and how far features and loss were and are from those of `original`, on an eighth of the images.

    Warns
    -----
    FxpruneWarning : if that loss stays as far off as if one part of it had doubled.

    Raises
    ------
    SettingError, BatchError, ModelError, PlanError
        If an option or a batch cannot be used, `pruned` carries no plan, or `original` is not what was pruned.

    Notes
    -----
    In several processes (`torch.distributed`) all get the same loader and return the same model: they share out the
    batches, and in training the images of each. After PRACTISE (CVPR 2023) and EagleEye (ECCV 2020).

    Examples
    --------
    >>> healed = fxprune.heal(fxprune.apply(model, plan), model, loader, "affine")   # doctest: +SKIP
    """
    check_heal(method)
    schedule = Schedule(steps, learning_rate, seed)
    care = Care(schedule, progress or unheard, thorough=method != "none")
    return mend(pruned, original, calib_loader, method, loss, care)


def mend(
    pruned: nn.Module,
    original: nn.Module,
    calib_loader: Iterable[Any],
    method: str,
    loss: Loss | None,
    care: Care,
) -> nn.Module:
    """As `heal`; unless it is to be thorough, no images are held out, nothing is judged and nothing noted."""
    network, before = network_of(pruned), network_of(original)
    plans = _carried_out_since(before, network)
    device = device_of(network)
    with on_device(device), untouched_randomness(network), torch.inference_mode(False), torch.no_grad():
        healed = private_copy(network, keep_precision=True)
        with failing_together():
            for record in plans[0].islands:
                traced_island(before, record, plans[0])  # held to its fingerprint
            pair, batches = _paired(before, network, plans, Calibration.of(calib_loader), loss)
        for model in (before, network):
            check_same_weights(model)
        check_same(batches)
        note = carry_out(method, Healing(pair, batches, care))
        healed.load_state_dict(pair.pruned.state_dict())
        overwrite_by_first([*healed.parameters(), *healed.buffers()])
        if care.thorough:
            *others, last = plans_of(healed)
            last = {**last, "settings": {**last["settings"], "heal": note}}
            _warn_of_loss(note, last["settings"].get("strategy"))
            remember(healed, [*others, last], alterations(healed), getattr(healed, SPARED, {}))
    return like_the_model(pruned, healed)


def _warn_of_loss(note: Note, strategy: str | None) -> None:
    """Say so where healing has left a model far from what it did."""
    loss = note.get("loss", {"after": 0.0})["after"]
    if (loss is None or loss >= LOST) and rank_and_world()[0] == 0:
        off = "no number" if loss is None else f"still off by {loss:.2g} (1: as if one part of it had doubled)"
        more = "more steps" if note["method"] == "mimic" else "heal='mimic'"
        more += " or strategy='search'" * (strategy != "search")
        warnings.warn(
            f"after healing, the loss on images that were held out is {off}: remove less, or try {more};"
            " fxprune.evaluate tells what the model still finds",
            FxpruneWarning,
            stacklevel=5,
        )


def _carried_out_since(before: nn.Module, network: nn.Module) -> tuple[Plan, ...]:
    """Plans that a network carries more than the one that was pruned, which may have been pruned before."""
    plans = plans_carried_out(network)[len(plans_of(before)) :]
    if not plans:
        raise ModelError(
            f"the {type(before).__name__} that was pruned carries as many plans as what is to be healed: give first"
            " the pruned model, then the model as it was"
        )
    return plans


def _paired(
    before: nn.Module, network: nn.Module, plans: Iterable[Plan], calibration: Calibration, loss: Loss | None
) -> tuple[Pair, list[Batch]]:
    """Private copies of both models, and the calibration batches in the form they are run on."""
    adapter = choose_adapter(before, calibration.first_raw, loss)
    old, new = private_copy(before), private_copy(network)
    for twin in (old, new):
        adapter.prepare(twin)
    batches = list(calibration.images(old, adapter))
    check_shareable(len(batches))
    islands = {node.island for plan in plans for node in plan.nodes}
    return pair_up(old, new, adapter, batches[0], islands), batches


def check_heal(method: object) -> None:
    """Raise `SettingError` unless a method is known."""
    check_choice("heal", method, HEALERS)
