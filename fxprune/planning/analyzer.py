"""Defines `analyze`: capture a model once, then score it by one or more criteria."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
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
from fxprune.attribution.linear_recovery import LinearMap
from fxprune.attribution.scoring import fit_recovery_maps, record_attribution
from fxprune.datasets.calibration import (
    check_same_batches,
    check_same_count,
    describe_targets,
    open_calibration,
)
from fxprune.datasets.calibration_facts import BatchFacts, count_boxes, describe_nonsense, watch
from fxprune.errors import LossError, warn_user
from fxprune.planning.analysis import Analysis
from fxprune.planning.candidates import build_candidates, build_node_records
from fxprune.planning.plan import IslandRecord, Totals
from fxprune.planning.provenance import Provenance
from fxprune.profiling.flops_params import count_params, group_parameters
from fxprune.profiling.folded_blocks import saved_by_folding
from fxprune.profiling.latency import BACKENDS, UNMEASURED, Latency, backend_copy, check_backend, measure_latency
from fxprune.runtime.distributed import all_gather, raise_on_all_ranks, rank_and_world, run_on_rank_zero
from fxprune.runtime.options import refuse_removed_keywords
from fxprune.runtime.private_copy import check_same_weights
from fxprune.runtime.progress import Progress, no_progress
from fxprune.version import __version__


@dataclass(frozen=True)
class AnalysisOptions:
    """Options of an analysis; see `analyze`.

    Raises
    ------
    SettingError
        If the criterion or the latency backend is not known.
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
    """Captures a model once and scores it by any number of criteria.

    Parameters
    ----------
    model : Module
        The caller's model. It is not changed; the work is done on a copy.
    loader : iterable or CalibrationSet
        Calibration batches. More than one call of `score` needs a `CalibrationSet`.
    options : AnalysisOptions
        Options. Their criterion is not used; `score` takes it.

    Attributes
    ----------
    captured : CapturedModel
        The captured copy.
    latency : Latency
        Latency of the model and of its regions, or `UNMEASURED`.

    Raises
    ------
    FxpruneError
        As for `analyze`.
    """

    def __init__(self, model: nn.Module, loader: Any, options: AnalysisOptions) -> None:
        self.options, say, self.is_checked = options, options.progress, False
        network = unwrap(model)
        check_same_weights(network)
        with raise_on_all_ranks():
            self.opened = open_calibration(network, loader, options.loss, options.seed)
            adapted, first = self.opened.adapted, self.opened.first
            backend = BACKENDS[options.latency_backend] if options.latency_backend else None
            timed = backend_copy(adapted.module, backend) if backend else None
            say("capture", 0, 1)
            self.captured = capture_model(adapted, first)
            say("capture", 1, 1)
        check_same_batches([first])
        self.name = type(network).__name__
        self.latency = UNMEASURED if timed is None else self._measure_latency(timed, first)

    def score(self, criterion: str | RegionScore) -> Analysis:
        """Score every region by a criterion, see `analyze`."""
        name, chosen = get_criterion(criterion)
        captured, say = self.captured, self.options.progress
        maps: Mapping[str, LinearMap] = {}
        if chosen.linear_recovery:
            self.opened = replace(self.opened, source=self.opened.keep())
            maps = fit_recovery_maps(captured, self.opened.own_batches(captured.adapted), say)
        facts: list[BatchFacts] = []
        batches = watch(self.opened.own_batches(captured.adapted), captured.adapted, facts)
        with self._explaining(facts):
            record, links, count = record_attribution(captured, chosen, batches, maps, say)
        check_same_count(count)
        facts = sorted(chain(*all_gather(facts)), key=lambda one: one.index)
        inputs = ScoringInputs(
            captured.regions, record, dict(captured.adapted.module.named_modules()), captured.adapted.seed
        )
        with raise_on_all_ranks():
            scores = chosen.score(inputs)
        scores = run_on_rank_zero(lambda: scores)
        units = [(block.unit.parts, block.params_saved) for block in captured.folded.values()]
        groups = group_parameters(captured.adapted.module, captured.graphs, units)
        with self._explaining(facts):
            regions, unscored = build_candidates(captured, scores, record, groups, self.latency)
        self._warn_of_nonsense(facts)
        settings = {
            "model": self.name,
            "criterion": name,
            "seed": captured.adapted.seed,
            "family": captured.adapted.adapter.family,
            "images": record.images,
            "batches": count,
            "targets": describe_targets(record.own_targets),
            **count_boxes(facts),
            "versions": library_versions(),
        }
        if self.latency is not UNMEASURED:
            settings["latency"] = {"backend": self.options.latency_backend, **self.latency.settings}
        blocks = sum(region.block for region in regions)
        params = count_params(captured.adapted.module) - saved_by_folding(captured.folded)[1]
        return Analysis(
            regions=regions,
            rejections=(*captured.rejections, *unscored),
            nodes=tuple(build_node_records(captured.graphs, record, captured.flops)),
            links=links,
            islands=tuple(IslandRecord(i.name, i.fingerprint, i.opaque, i.constants) for i in captured.islands),
            before=Totals(captured.total_flops, params, blocks, self.latency.whole_ms),
            settings=Provenance(settings),
            groups=tuple(groups),
        )

    @contextmanager
    def _explaining(self, facts: Sequence[BatchFacts]) -> Iterator[None]:
        """Add to a `LossError` in the block what the batches have that makes scores meaningless."""
        try:
            yield
        except LossError as error:
            error.args = ("; ".join([str(error), *self._nonsense(facts)]),)
            raise

    def _warn_of_nonsense(self, facts: Sequence[BatchFacts]) -> None:
        """Warn, at the first scoring and in one process, of what makes scores meaningless."""
        if not self.is_checked and rank_and_world()[0] == 0:
            for text in self._nonsense(facts):
                warn_user(text)
        self.is_checked = True

    def _nonsense(self, facts: Sequence[BatchFacts]) -> list[str]:
        adapted = self.captured.adapted
        return describe_nonsense(facts, adapted.adapter.takes_unit_images(adapted.module))

    def _measure_latency(self, timed: nn.Module, first: Batch) -> Latency:
        """Measure the latency in one process; the others wait for the result."""
        backend, captured = BACKENDS[str(self.options.latency_backend)], self.captured
        module, adapter = captured.adapted.module, captured.adapted.adapter
        return run_on_rank_zero(
            lambda: measure_latency(
                backend, timed, module, captured.graphs, captured.regions, adapter, first, tell=self.options.progress
            )
        )


def analyze_with(model: nn.Module, loader: Any, options: AnalysisOptions) -> Analysis:
    """Analyze a model as `analyze` does, with the options in one object."""
    with isolated_run(unwrap(model), grad=True):
        return Analyzer(model, loader, options).score(options.criterion)


def analyze_by_criteria(
    model: nn.Module, loader: Any, criteria: Iterable[str | RegionScore], options: AnalysisOptions
) -> dict[str, Analysis]:
    """Capture a model once and score it by several criteria.

    Returns
    -------
    dict of str to Analysis
        By the name of the criterion.
    """
    with isolated_run(unwrap(model), grad=True):
        calibration = open_calibration(model, loader, options.loss, options.seed).keep()
        analyzer = Analyzer(model, calibration, options)
        return {get_criterion(criterion)[0]: analyzer.score(criterion) for criterion in criteria}


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
    """Find the regions of a model that can be removed, and compute their scores and costs.

    Parameters
    ----------
    model : Module
        A torchvision detector or classifier, an ultralytics model or `YOLO` object, or any model with a `loss`.
        It is not changed; the work is done on a copy in float32.
    calib_loader : iterable
        Calibration batches in a form that the model's adapter knows; the error for other forms lists the known ones.
        Batches without labels get the model's own confident outputs as targets. The loader is read once.
    criterion : str or callable
        ``"fisher"`` (default), ``"fisher_mended"``, ``"grad_delta"``, ``"grad_act"`` (arXiv 2602.14040), ``"l1"`` (its
        baseline), ``"random"``, or ``callable(region, modules) -> float`` with the region's modules by dotted path;
        see `fxprune.attribution.criteria`. ``"fisher_mended"`` keeps the batches in memory.
    loss : callable, optional
        ``loss(model, batch) -> scalar Tensor``, the mean over the images. Needed for models without an own adapter.
    seed : int
        Seed for samplers inside the loss and for ``criterion="random"``.
    latency_backend : str, optional
        ``"eager"`` or ``"inductor"`` (``torch.compile(dynamic=False)``): measure the milliseconds of one call on this
        backend, in float32, on the first batch, on the model's device, with torch's number of threads. Run nothing
        else at that time.
    progress : callable, optional
        ``progress(stage, done, total)``; `total` is None if it is not known.

    Returns
    -------
    Analysis
        Regions, scores and costs. Where a block has a method that folds its branches into one layer after training
        (`fxprune.profiling.folded_blocks`), its FLOPs and parameters are those after the fold; its latency is measured
        as it is. In several processes (`torch.distributed`), call `analyze` in each with the same
        model and loader: they share the batches and return the same. Only one process measures the latency.

    Raises
    ------
    ModelError, NoRegionError
        If the model cannot be analyzed, or has nothing to remove.
    BatchError, LossError, SettingError
        If a batch, its loss or an option cannot be used. The message names the batch.

    Examples
    --------
    >>> plan = fxprune.analyze(model, loader).plan(budget=0.1)     # doctest: +SKIP
    """
    options = AnalysisOptions(criterion, loss, seed, latency_backend, progress or no_progress)
    return analyze_with(model, calib_loader, options)


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that an analysis depends on."""
    return {
        "fxprune": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
