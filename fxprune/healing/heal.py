"""Mend what a removal broke, from the calibration images alone: no labels, nothing that costs time at inference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fxprune.adapters.calls import isolated_run
from fxprune.adapters.custom_loss import Loss
from fxprune.adapters.protocol import Batch
from fxprune.adapters.registry import rewrap_like, unwrap
from fxprune.datasets.calibration import check_same_batches, open_calibration
from fxprune.errors import ModelError
from fxprune.healing.methods import HealingContext, HealingOptions, HealingRun, Note, run_method
from fxprune.healing.teacher_student import TeacherStudent, pair_models
from fxprune.planning.plan import Plan
from fxprune.rewriting.apply import trace_checked
from fxprune.rewriting.history import SAVINGS_ATTRIBUTE, applied_plans, attach_history, raw_plans, structural_changes
from fxprune.runtime.distributed import (
    broadcast_tensors,
    check_enough_batches,
    raise_on_all_ranks,
    rank_and_world,
)
from fxprune.runtime.options import refuse_removed_keywords
from fxprune.runtime.private_copy import check_same_weights, private_copy
from fxprune.runtime.progress import Progress, no_progress
from fxprune.runtime.user_warnings import warn_user

WARN_LOSS_DEVIATION = 1.0
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
    options = HealingOptions(method, steps, learning_rate, seed, loss, progress or no_progress)
    return heal_with(pruned, original, calib_loader, options)


def heal_with(pruned: nn.Module, original: nn.Module, calib_loader: Any, options: HealingOptions) -> nn.Module:
    """Heal a model; as `heal`, with the options in one value."""
    context = HealingContext(options.schedule(), options.progress, final=options.method != "none")
    return heal_student(pruned, original, calib_loader, options.method, options.loss, context)


def heal_student(
    pruned: nn.Module,
    original: nn.Module,
    calib_loader: Any,
    method: str,
    loss: Loss | None,
    context: HealingContext,
) -> nn.Module:
    """As `heal`; unless it is to be thorough, no images are held out, nothing is judged and nothing noted."""
    network, before = unwrap(pruned), unwrap(original)
    plans = _plans_applied_since(before, network)
    with isolated_run(network, grad=False):
        healed = private_copy(network, keep_precision=True)
        with raise_on_all_ranks():
            for record in plans[0].islands:
                trace_checked(before, record, plans[0])  # held to its fingerprint
            pair, batches = _make_pair(before, network, plans, calib_loader, loss)
        for model in (before, network):
            check_same_weights(model)
        check_same_batches(batches)
        note = run_method(method, HealingRun(pair, batches, context))
        healed.load_state_dict(pair.student.state_dict())
        broadcast_tensors([*healed.parameters(), *healed.buffers()])
        if context.final:
            *others, last = raw_plans(healed)
            last = {**last, "settings": {**last["settings"], "heal": note}}
            _warn_of_loss(note, last["settings"].get("strategy"))
            attach_history(healed, [*others, last], structural_changes(healed), getattr(healed, SAVINGS_ATTRIBUTE, {}))
    return rewrap_like(pruned, healed)


def _warn_of_loss(note: Note, strategy: str | None) -> None:
    """Say so where healing has left a model far from what it did."""
    loss = note.get("loss", {"after": 0.0})["after"]
    if (loss is None or loss >= WARN_LOSS_DEVIATION) and rank_and_world()[0] == 0:
        off = "no number" if loss is None else f"still off by {loss:.2g} (1: as if one part of it had doubled)"
        more = "more steps" if note["method"] == "mimic" else "heal='mimic'"
        more += " or strategy='search'" * (strategy != "search")
        warn_user(
            f"after healing, the loss on images that were held out is {off}: remove less, or try {more};"
            " fxprune.evaluate tells what the model still finds"
        )


def _plans_applied_since(before: nn.Module, network: nn.Module) -> tuple[Plan, ...]:
    """Plans that a network carries more than the one that was pruned, which may have been pruned before."""
    plans = applied_plans(network)[len(raw_plans(before)) :]
    if not plans:
        raise ModelError(
            f"the {type(before).__name__} that was pruned carries as many plans as what is to be healed: give first"
            " the pruned model, then the model as it was"
        )
    return plans


def _make_pair(
    before: nn.Module, network: nn.Module, plans: Iterable[Plan], loader: Any, loss: Loss | None
) -> tuple[TeacherStudent, list[Batch]]:
    """Copy both models, and read the calibration batches."""
    opened = open_calibration(before, loader, loss)
    teacher, student = opened.adapted, opened.adapted.copy_version(network)
    batches = opened.image_batches()
    check_enough_batches(len(batches))
    islands = {node.island for plan in plans for node in plan.nodes}
    return pair_models(teacher.module, student.module, teacher.adapter, batches[0], islands), batches
