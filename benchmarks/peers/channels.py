"""Channel pruning by Torch-Pruning, the peer that block removal is held against, applied as its users apply it.

What it cannot take in one way is tried in the others before it counts as a failure; every failure keeps its own words.
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

from benchmarks.peers.handover import Prepared, Way, collect, flops_of, prepare, tracing, ways_for
from fxprune.adapters.calls import batch_loss

TRIAL = 0.1
"""Pruning ratio at which a way is tried."""
TOLERANCE = 0.005
"""How far the FLOPs saved may be from what is asked, as a share of all."""
STEPS = 12
"""Most halvings in the search for a ratio."""


class PeerError(Exception):
    """The peer gave a model that does not work."""


@dataclass(frozen=True)
class Settings:
    """How channels are chosen: ``taylor`` or ``magnitude``, and to what number widths are rounded."""

    importance: str
    round_to: int | None = None


def prune_channels(prepared: Prepared, settings: Settings, ratio: float) -> tuple[nn.Module, float]:
    """Prune a fresh copy.

    Parameters
    ----------
    prepared : Prepared
        The detector.
    settings : Settings
        How channels are chosen.
    ratio : float
        The peer's ``pruning_ratio``, the share of channels that go.

    Returns
    -------
    model : Module
        In eval mode, checked by `check`.
    seconds : float
        That a user would have waited: the call, and the gradients if it needs them.
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
            in_channel_groups={}, out_channel_groups={},  # its defaults are shared between calls and keep models alive
            forward_fn=tracing(prepared.adapter, example, prepared.outputs),
        )  # fmt: skip
        pruner.step()
    seconds = time.perf_counter() - started + (prepared.seconds if taylor else 0.0)
    for name, value in model.named_parameters():
        value.grad = None
        value.requires_grad_(name not in prepared.frozen)
    del pruner
    gc.collect()  # its graph is full of cycles, which hold the activations of the traced run
    check(prepared, model)
    return model.eval(), seconds


def check(prepared: Prepared, model: nn.Module) -> None:
    """Refuse a pruned model that does not run, gives outputs of other shapes, has no finite loss or costs no less.

    Raises
    ------
    PeerError
        Says which.
    """
    adapter, example = prepared.adapter, prepared.example
    before, after = (collect(each, adapter, example, prepared.outputs) for each in (prepared.model, model))
    for (name, old, _), (_, new, _) in zip(before, after, strict=True):
        if old.shape[1:] != new.shape[1:]:
            raise PeerError(f"{name} gives {tuple(new.shape[1:])} where it gave {tuple(old.shape[1:])}")
    with torch.no_grad():
        batch_loss(model, adapter, example, 0, seed=0)
    if flops_of(model.eval(), adapter, example) >= prepared.flops:
        raise PeerError("no FLOPs are saved")


def first_working_way(
    model: nn.Module, batches: Sequence[Any], settings: Settings
) -> tuple[Prepared | None, list[tuple[Way, str]]]:
    """Try the ways in turn; give the first that yields a working model, and those before it with their errors."""
    failures = []
    for way in ways_for(model):
        try:
            prepared = prepare(model, batches, way)
            prune_channels(prepared, settings, TRIAL)
        except Exception as error:  # the peer's own code may fail in any way of its own
            failures.append((way, first_line(error)))
        else:
            return prepared, failures
    return None, failures


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def find_ratio(target: float, share_at: Callable[[float], float | None], known: Mapping[float, float]) -> float:
    """Halve an interval of pruning ratios until the FLOPs saved are as asked.

    Parameters
    ----------
    target : float
        Share of the FLOPs to save.
    share_at : callable
        ``ratio -> share saved``, or None where that ratio gives no working model.
    known : mapping of float to float
        Ratios whose share is known already.

    Returns
    -------
    float
        The ratio within `TOLERANCE` of the target, or the nearest found.

    Raises
    ------
    PeerError
        No ratio gives a working model.
    """
    shares = dict(known)
    low = max((ratio for ratio, share in shares.items() if share < target), default=0.0)
    high = min((ratio for ratio, share in shares.items() if share >= target and ratio > low), default=1.0)
    for _ in range(STEPS):
        if any(abs(share - target) <= TOLERANCE for share in shares.values()):
            break
        middle = (low + high) / 2
        share = share_at(middle)
        if share is not None:
            shares[middle] = share
        low, high = (middle, high) if share is not None and share < target else (low, middle)
    if not shares:
        raise PeerError("no pruning ratio gives a working model")
    return min(shares, key=lambda ratio: abs(shares[ratio] - target))
