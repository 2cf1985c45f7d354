"""Heals a pruned model on calibration images, by most methods without labels; it adds no cost at inference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fxprune.adapters.calls import isolated_run
from fxprune.adapters.custom_loss import Loss
from fxprune.adapters.protocol import Batch
from fxprune.adapters.registry import rewrap_like, unwrap
from fxprune.datasets.calibration import check_same_batches, open_calibration
from fxprune.errors import ModelError, warn_user
from fxprune.healing.methods import LABELLED_METHODS, HealingContext, HealingOptions, HealingRun, Note, run_method
from fxprune.healing.teacher_student import TeacherStudent, pair_models
from fxprune.planning.plan import Plan
from fxprune.rewriting.apply import trace_checked
from fxprune.rewriting.history import applied_plans, note_in_last_plan, raw_plans
from fxprune.runtime.distributed import (
    broadcast_tensors,
    check_enough_batches,
    raise_on_all_ranks,
    rank_and_world,
)
from fxprune.runtime.options import refuse_removed_keywords
from fxprune.runtime.private_copy import check_same_weights, private_copy
from fxprune.runtime.progress import Progress, no_progress

WARN_LOSS_DEVIATION = 1.0
"""Loss deviation from which on `heal` warns. A deviation of 1 is as if one part of the loss had doubled."""


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
    """Bring a pruned model's features closer to those of the original, at no cost at inference.

    Parameters
    ----------
    pruned, original : Module
        The output and the input of `fxprune.apply` or `fxprune.compile`. Neither is changed.
    calib_loader, loss
        As for `fxprune.analyze`. Only ``"mimic_labelled"`` reads labels and minimizes the loss.
    method : str
        ``"none"``; ``"affine"``: fits weights, scales and shifts layer by layer, in closed form, to the outputs of the
        original; salient positions have larger weights (`fxprune.healing.saliency`); ``"mimic"``: the same, then a
        short training on the features of the original (`fxprune.healing.distillation.feature_mimic`);
        ``"mimic_labelled"``: the same, but the training also minimizes the model's own loss on the labels of the
        batches (`fxprune.healing.distillation.labelled_distance`). All interpolate between old and new weights, so that
        the loss on one eighth of the images, which is held out, is nearest to that of the original; with labels, so
        that it is least.
    steps, learning_rate, seed
        Settings of the training: about four images per step; at most `learning_rate`, less if the training diverges.
    progress : callable, optional
        ``progress(stage, done, total)``.

    Returns
    -------
    Module
        A healed copy with the mode, device, dtype, graphs and shapes of `pruned`. ``settings["heal"]`` of its last plan
        holds the method, and the distances of features and loss to `original` before and after, on held-out images.

    Warns
    -----
    FxpruneWarning : if the loss on held-out images is still as far off as if one part of it had doubled.

    Raises
    ------
    SettingError, BatchError, ModelError, PlanError
        If an option or a batch cannot be used, `pruned` carries no plan, or `pruned` was not made from `original`.

    Notes
    -----
    With `torch.distributed`, pass the same loader in all processes. They share the batches, and in training the images
    of each batch, and return the same model. The methods follow PRACTISE (CVPR 2023) and EagleEye (ECCV 2020).

    Examples
    --------
    >>> healed = fxprune.heal(fxprune.apply(model, plan), model, loader, "affine")   # doctest: +SKIP
    """
    options = HealingOptions(method, steps, learning_rate, seed, loss, progress or no_progress)
    return heal_with(pruned, original, calib_loader, options)


def heal_with(pruned: nn.Module, original: nn.Module, calib_loader: Any, options: HealingOptions) -> nn.Module:
    """Heal a model as `heal` does, with the options in one object."""
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
    """Heal a model as `heal` does.

    Trials (`context.final` is False) are fitted to all images, none is held out, and the plan gets no ``"heal"`` entry.
    """
    network, before = unwrap(pruned), unwrap(original)
    plans = _plans_applied_since(before, network)
    with isolated_run(network, grad=False):
        healed = private_copy(network, keep_precision=True)
        with raise_on_all_ranks():
            for record in plans[0].islands:
                trace_checked(before, record, plans[0])  # raises if the fingerprints differ
            pair, batches = _make_pair(before, network, plans, calib_loader, loss, method in LABELLED_METHODS)
        for model in (before, network):
            check_same_weights(model)
        check_same_batches(batches)
        note = run_method(method, HealingRun(pair, batches, context))
        healed.load_state_dict(pair.student.state_dict())
        broadcast_tensors([*healed.parameters(), *healed.buffers()])
        if context.final:
            note_in_last_plan(healed, heal=note, measured=None)  # what was measured before is no longer true
            _warn_of_loss(note, raw_plans(healed)[-1]["settings"].get("strategy"))
    return rewrap_like(pruned, healed)


def _warn_of_loss(note: Note, strategy: str | None) -> None:
    """Warn if the loss of a healed model is still far from that of the original."""
    loss = note.get("loss", {"after": 0.0})["after"]
    if (loss is None or loss >= WARN_LOSS_DEVIATION) and rank_and_world()[0] == 0:
        off = "no number" if loss is None else f"still off by {loss:.2g} (1: as if one part of it had doubled)"
        more = "more steps" if "steps" in note else "heal='mimic'"
        more += " or strategy='search'" * (strategy != "search")
        warn_user(
            f"after healing, the loss on images that were held out is {off}: remove less, or try {more};"
            " fxprune.evaluate tells what the model still finds"
        )


def _plans_applied_since(before: nn.Module, network: nn.Module) -> tuple[Plan, ...]:
    """Return the plans of a network that the original does not carry. The original may itself be a pruned model."""
    plans = applied_plans(network)[len(raw_plans(before)) :]
    if not plans:
        raise ModelError(
            f"the original {type(before).__name__} carries as many plans as what is to be healed: give first the pruned"
            " model, then the original"
        )
    return plans


def _make_pair(
    before: nn.Module, network: nn.Module, plans: Iterable[Plan], loader: Any, loss: Loss | None, labels: bool = False
) -> tuple[TeacherStudent, list[Batch]]:
    """Copy both models and read the calibration batches."""
    opened = open_calibration(before, loader, loss)
    teacher, student = opened.adapted, opened.adapted.copy_version(network)
    batches = opened.labelled_batches() if labels else list(opened.image_batches())
    check_enough_batches(len(batches))
    islands = {node.island for plan in plans for node in plan.nodes}
    return pair_models(teacher.module, student.module, teacher.adapter, batches[0], islands), batches
