"""Everything in one call: score, choose, remove, mend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxprune.adapters.protocol import device_of
from fxprune.adapters.registry import choose_adapter, unwrap
from fxprune.attribution.criteria import RegionScore
from fxprune.datasets.calibration import Calibration
from fxprune.healing.distillation.schedule import Schedule
from fxprune.healing.heal import Loss, check_heal, heal
from fxprune.planning.analysis import check_cost
from fxprune.planning.ilp import check_budget
from fxprune.profiling.latency import choose_backend
from fxprune.rewriting.apply import apply
from fxprune.runtime.distributed import on_device, raise_on_all_ranks
from fxprune.runtime.options import refuse_removed_keywords
from fxprune.runtime.private_copy import preserve_rng_state, private_copy
from fxprune.runtime.progress import Progress, no_progress
from fxprune.search.plan_search import DEFAULT_TRIES, SearchSettings

QUICK_METHODS = {"mimic": "affine"}
"""How plans are mended while they are compared, where the result is mended in a way that takes long."""


@refuse_removed_keywords
def compile(
    model: nn.Module,
    calib_loader: Iterable[Any],
    budget: float = 0.1,
    *,
    criterion: str | RegionScore = "fisher",
    cost: str = "flops",
    strategy: str = "one_shot",
    heal: str = "affine",
    loss: Loss | None = None,
    latency_backend: str | None = None,
    seed: int = 0,
    tries: int = DEFAULT_TRIES,
    steps: int = 400,
    progress: Progress | None = None,
) -> nn.Module:
    """Remove a fraction of a model's cost, and mend what that broke.

    Parameters
    ----------
    model, calib_loader, criterion, loss, latency_backend, seed, progress
        As for `fxprune.analyze`.
    budget : float
        Fraction in (0, 1) of the whole model's cost to remove.
    cost : str
        What the budget counts: ``"flops"``, ``"latency"`` (by default in eager mode), ``"params"`` or ``"blocks"``.
    strategy : str
        ``"one_shot"``: the best plan by score. ``"search"``, for budgets of 0.2 on: `tries` plans, first those of the
        criterion, ``"fisher_mended"`` and their mean, mended on 64 images, judged on 192 others
        (`fxprune.search.agreement`). An interrupted search returns the best plan so far.
    heal : str
        How it is mended, see `fxprune.heal`. All but ``"none"`` keep the batches in memory.

    Returns
    -------
    Module
        The same kind of model, smaller; see `fxprune.apply`. `fxprune.report` says what went. The same in all
        processes (`torch.distributed`) if all call it with the same model and loader; an interruption ends them.

    Raises
    ------
    FxpruneError : as `analyze`, `Analysis.plan`, `apply` and `heal` do.

    Examples
    --------
    >>> pruned = fxprune.compile(model, loader, budget=0.3, strategy="search", heal="mimic")   # doctest: +SKIP
    """
    check_budget(budget)
    check_cost(cost)
    check_heal(heal)
    Schedule(steps)
    quick, timed, say = QUICK_METHODS.get(heal, heal), choose_backend(cost, latency_backend), progress or no_progress
    search = SearchSettings(strategy, float(budget), cost, criterion, quick, loss, seed, timed, tries, say)
    with on_device(device_of(unwrap(model))):
        calibration = Calibration.of(calib_loader)
        if strategy != "one_shot" or heal != "none":
            materialize_calibration(model, calibration, loss)
        pruned = apply(model, search.run(model, calibration))
        return pruned if heal == "none" else _heal_pruned(pruned, model, calibration, search, heal, steps)


def materialize_calibration(model: nn.Module, calibration: Calibration, loss: Loss | None) -> None:
    """Keep the batches, labelled by the model as it was if need be."""
    network = unwrap(model)
    with raise_on_all_ranks(), preserve_rng_state(network), torch.inference_mode(False):
        twin = private_copy(network)
        adapter = choose_adapter(twin, calibration.first_raw, loss)
        adapter.prepare(twin)
        calibration.keep(twin, adapter)


def _heal_pruned(
    pruned: nn.Module, model: nn.Module, calibration: Calibration, search: SearchSettings, method: str, steps: int
) -> nn.Module:
    say = search.progress
    return heal(pruned, model, calibration, method, loss=search.loss, steps=steps, seed=search.seed, progress=say)
