"""From a model and its batches to an `Analysis`: capture once, score by any number of criteria."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torchvision
from torch import nn

from fxprune.adapters.calls import isolated_run
from fxprune.adapters.custom_loss import Loss
from fxprune.adapters.protocol import Batch
from fxprune.adapters.registry import unwrap
from fxprune.attribution.captured_model import capture_model
from fxprune.attribution.criteria import RegionScore, ScoringInputs, get_criterion
from fxprune.attribution.scoring import fit_recovery_maps, record_attribution
from fxprune.datasets.calibration import (
    check_same_batches,
    check_same_count,
    describe_targets,
    open_calibration,
)
from fxprune.planning.analysis import Analysis
from fxprune.planning.candidates import build_candidates, build_node_records
from fxprune.planning.plan import IslandRecord, Totals
from fxprune.planning.provenance import Provenance
from fxprune.profiling.flops_params import count_params, group_parameters
from fxprune.profiling.latency import BACKENDS, UNMEASURED, Latency, backend_copy, check_backend, measure_latency
from fxprune.runtime.distributed import raise_on_all_ranks, run_on_rank_zero
from fxprune.runtime.options import refuse_removed_keywords
from fxprune.runtime.private_copy import check_same_weights
from fxprune.runtime.progress import Progress, no_progress
from fxprune.version import __version__


@dataclass(frozen=True)
class AnalysisOptions:
    """How a model is analyzed; see `analyze`.

    Raises
    ------
    SettingError
        If one is not known.
    """

    criterion: str | RegionScore = "fisher"
    loss: Loss | None = None
    seed: int = 0
    latency_backend: str | None = None
    progress: Progress = field(default=no_progress, repr=False)

    def __post_init__(self) -> None:
        get_criterion(self.criterion)
        check_backend(self.latency_backend)


class Analyzer:
    """A model that is captured once and scored by any number of criteria.

    Parameters
    ----------
    model : Module
        The caller's; the work is done on a copy.
    loader : iterable or CalibrationSet
        Batches. To score by more than one criterion they have to be kept.
    options : AnalysisOptions
        The criterion is not looked at; it is given to `score`.

    Attributes
    ----------
    captured : CapturedModel
        The copy, captured.
    latency : Latency
        What was measured before it was captured.

    Raises
    ------
    FxpruneError
        As `analyze` does.
    """

    def __init__(self, model: nn.Module, loader: Any, options: AnalysisOptions) -> None:
        self.options, say = options, options.progress
        network = unwrap(model)
        check_same_weights(network)
        with raise_on_all_ranks():
            self.opened = open_calibration(network, loader, options.loss, options.seed)
            adapted, first = self.opened.adapted, self.opened.first
            backend = BACKENDS[options.latency_backend] if options.latency_backend else None
            twin = backend_copy(adapted.module, backend) if backend else None
            say("capture", 0, 1)
            self.captured = capture_model(adapted, first)
            say("capture", 1, 1)
        check_same_batches([first])
        self.name = type(network).__name__
        self.latency = UNMEASURED if twin is None else self._measure_latency(twin, first)

    def score(self, criterion: str | RegionScore) -> Analysis:
        """Score every region; see `analyze` for the criteria."""
        name, chosen = get_criterion(criterion)
        captured, opened, say = self.captured, self.opened, self.options.progress
        if chosen.linear_recovery:
            opened = replace(opened, source=opened.keep())
            maps = fit_recovery_maps(captured, opened.own_batches(captured.adapted), say)
        else:
            maps = {}
        record, links, count = record_attribution(captured, chosen, opened.own_batches(captured.adapted), maps, say)
        check_same_count(count)
        inputs = ScoringInputs(
            captured.regions, record, dict(captured.adapted.module.named_modules()), captured.adapted.seed
        )
        with raise_on_all_ranks():
            scores = chosen.score(inputs)
        scores = run_on_rank_zero(lambda: scores)
        groups = group_parameters(captured.adapted.module, captured.graphs)
        regions, unscored = build_candidates(captured.regions, scores, captured.flops, groups, self.latency)
        settings = {
            "model": self.name,
            "criterion": name,
            "seed": captured.adapted.seed,
            "family": captured.adapted.adapter.family,
            "images": record.images,
            "batches": count,
            "targets": describe_targets(record.own_targets),
            "versions": library_versions(),
        }
        if self.latency is not UNMEASURED:
            settings["latency"] = {"backend": self.options.latency_backend, **self.latency.settings}
        blocks = sum(region.block for region in regions)
        params = count_params(captured.adapted.module)
        return Analysis(
            regions=regions,
            rejections=(*captured.rejections, *unscored),
            nodes=tuple(build_node_records(captured.graphs, record, captured.flops)),
            links=links,
            islands=tuple(IslandRecord(i.name, i.fingerprint, i.opaque) for i in captured.islands),
            before=Totals(captured.total_flops, params, blocks, self.latency.whole_ms),
            settings=Provenance(settings),
            groups=tuple(groups),
        )

    def _measure_latency(self, twin: nn.Module, first: Batch) -> Latency:
        """Measure milliseconds; one process does, alone."""
        backend, captured = BACKENDS[str(self.options.latency_backend)], self.captured
        module, adapter = captured.adapted.module, captured.adapted.adapter
        return run_on_rank_zero(
            lambda: measure_latency(
                backend, twin, module, captured.graphs, captured.regions, adapter, first, tell=self.options.progress
            )
        )


def analyze_with(model: nn.Module, loader: Any, options: AnalysisOptions) -> Analysis:
    """Analyze a model; as `analyze`, with the options in one value."""
    with isolated_run(unwrap(model), grad=True):
        return Analyzer(model, loader, options).score(options.criterion)


@refuse_removed_keywords
def analyze(
    model: nn.Module,
    calib_loader: Iterable[Any],
    *,
    criterion: str | RegionScore = "fisher",
    loss: Loss | None = None,
    seed: int = 0,
    latency_backend: str | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Find what can be removed from a model, what that would save, and how important it is.

    Parameters
    ----------
    model : Module
        A torchvision detector or classifier, an ultralytics model or `YOLO` object, or anything with a `loss`.
        It is not changed; the work is done on a copy in float32.
    calib_loader : iterable
        Batches in the form this kind of model takes (an unknown form raises with the known ones), with labels or
        images alone; then the model's own confident outputs are the targets. Read once.
    criterion : str or callable
        ``"fisher"`` (default), ``"fisher_mended"``, ``"grad_delta"``, ``"grad_act"`` (arXiv 2602.14040), ``"l1"`` (its
        baseline), ``"random"``, or ``callable(region, modules) -> float`` with the region's modules by dotted path;
        see `fxprune.attribution.criteria`. ``"fisher_mended"`` keeps the batches in memory.
    loss : callable, optional
        ``loss(model, batch) -> scalar Tensor``, the mean over the images; for models of no known kind.
    seed : int
        For samplers inside the loss, and for ``criterion="random"``.
    latency_backend : str, optional
        ``"eager"`` or ``"inductor"`` (``torch.compile(dynamic=False)``): measure the milliseconds of one call in
        float32 on the first batch there, on the model's device, with torch's threads. Let nothing else run meanwhile.
    progress : callable, optional
        ``progress(stage, done, total)``; `total` is None where it is not known.

    Returns
    -------
    Analysis
        The same in all processes (`torch.distributed`), which share out the batches: call it in each, with the same
        model and loader. Milliseconds are measured by one process alone.

    Raises
    ------
    ModelError, NoRegionError
        If the model cannot be analyzed, or has nothing to remove.
    BatchError, LossError, SettingError
        If a batch, its loss (names the batch) or an option cannot be used.

    Examples
    --------
    >>> plan = fxprune.analyze(model, loader).plan(budget=0.1)     # doctest: +SKIP
    """
    options = AnalysisOptions(criterion, loss, seed, latency_backend, progress or no_progress)
    return analyze_with(model, calib_loader, options)


def library_versions() -> dict[str, str]:
    """Return the versions of what an analysis depends on."""
    return {
        "fxprune": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
