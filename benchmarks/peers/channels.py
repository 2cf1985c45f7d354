"""Channel pruning by Torch-Pruning (the peer), which block removal is compared with.

A detector can be prepared for it in several ways (`benchmarks.peers.handover`). It counts as a failure if no way works;
the error message of every way is kept.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.peers.handover import (
    Prepared,
    Way,
    count_inference_flops,
    list_ways,
    make_tracer,
    prepare,
    record_outputs,
)
from fxprune.adapters.calls import batch_loss

TRIAL_RATIO = 0.1
"""Pruning ratio at which a way is tried."""
FLOPS_TOLERANCE = 0.005
"""Largest difference between the FLOPs saved and the target, as a fraction of all FLOPs."""
MAX_HALVINGS = 12
"""Of the interval of ratios in `find_ratio`."""


class PeerError(Exception):
    """The peer returned a model that does not work."""


@dataclass(frozen=True)
class Settings:
    """How the peer chooses channels.

    Attributes
    ----------
    importance : str
        ``taylor`` or ``magnitude``.
    round_to : int, optional
        Numbers of channels are rounded to multiples of this.
    """

    importance: str
    round_to: int | None = None


def prune_channels(prepared: Prepared, settings: Settings, ratio: float) -> tuple[nn.Module, float]:
    """Prune a copy of a detector.

    Parameters
    ----------
    prepared : Prepared
        The detector.
    settings : Settings
        How channels are chosen.
    ratio : float
        The peer's ``pruning_ratio``: the fraction of channels to remove.

    Returns
    -------
    model : Module
        In eval mode, checked by `check_pruned`.
    seconds : float
        Wall time of the call, and of the gradients if the importance needs them.
    """
    import torch_pruning as tp

    model, example = copy.deepcopy(prepared.model), prepared.example
    taylor = settings.importance == "taylor"
    importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance()
    for name, value in model.named_parameters():
        value.grad = prepared.gradients.get(name) if taylor else None
    started = time.perf_counter()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model, example.images, importance, global_pruning=True, pruning_ratio=ratio, round_to=settings.round_to,
            ignored_layers=[model.get_submodule(name) for name in prepared.ignored],
            in_channel_groups={}, out_channel_groups={},  # shared between calls by default, which keeps models alive
            forward_fn=make_tracer(prepared.adapter, example, prepared.outputs),
        )  # fmt: skip
        pruner.step()
    seconds = time.perf_counter() - started + (prepared.seconds if taylor else 0.0)
    for name, value in model.named_parameters():
        value.grad = None
        value.requires_grad_(name not in prepared.frozen)
    del pruner
    gc.collect()  # its graph has reference cycles, which hold the activations of the traced run
    check_pruned(prepared, model)
    return model.eval(), seconds


def check_pruned(prepared: Prepared, model: nn.Module) -> None:
    """Check that a pruned model runs, keeps the shapes of its outputs, has a finite loss and saves FLOPs.

    Raises
    ------
    PeerError
        It does not. The message says why.
    """
    adapter, example = prepared.adapter, prepared.example
    before, after = (record_outputs(each, adapter, example, prepared.outputs) for each in (prepared.model, model))
    for (name, old, _), (_, new, _) in zip(before, after, strict=True):
        if old.shape[1:] != new.shape[1:]:
            raise PeerError(f"{name} gives {tuple(new.shape[1:])} where it gave {tuple(old.shape[1:])}")
    with torch.no_grad():
        batch_loss(model, adapter, example, 0, seed=0)
    if count_inference_flops(model.eval(), adapter, example) >= prepared.flops:
        raise PeerError("no FLOPs are saved")


def first_working_way(
    model: nn.Module, batches: Sequence[Any], settings: Settings
) -> tuple[Prepared | None, list[tuple[Way, str]]]:
    """Try the ways in turn.

    Returns
    -------
    prepared : Prepared, optional
        The detector, prepared in the first way that gives a working model.
    failures : list of (Way, str)
        The ways before it with their errors.
    """
    failures = []
    for way in list_ways(model):
        try:
            prepared = prepare(model, batches, way)
            prune_channels(prepared, settings, TRIAL_RATIO)
        except Exception as error:  # the peer may raise any exception
            failures.append((way, summarize_error(error)))
        else:
            return prepared, failures
    return None, failures


def summarize_error(error: Exception) -> str:
    """Give the class and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def find_ratio(target: float, share_at: Callable[[float], float | None], known: Mapping[float, float]) -> float:
    """Find the pruning ratio that saves a fraction of the FLOPs, by bisection.

    Parameters
    ----------
    target : float
        Fraction of the FLOPs to save.
    share_at : callable
        ``ratio -> fraction saved``; None if the ratio gives no working model.
    known : mapping of float to float
        Ratios with known fractions.

    Returns
    -------
    float
        A ratio within `FLOPS_TOLERANCE` of the target, or the nearest found.

    Raises
    ------
    PeerError
        No ratio gives a working model.
    """
    shares = dict(known)
    low = max((ratio for ratio, share in shares.items() if share < target), default=0.0)
    high = min((ratio for ratio, share in shares.items() if share >= target and ratio > low), default=1.0)
    for _ in range(MAX_HALVINGS):
        if any(abs(share - target) <= FLOPS_TOLERANCE for share in shares.values()):
            break
        middle = (low + high) / 2
        share = share_at(middle)
        if share is not None:
            shares[middle] = share
        low, high = (middle, high) if share is not None and share < target else (low, middle)
    if not shares:
        raise PeerError("no pruning ratio gives a working model")
    return min(shares, key=lambda ratio: abs(shares[ratio] - target))
