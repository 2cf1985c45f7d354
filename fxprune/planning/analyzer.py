"""The analysis of a model: capture it, find its regions, count its costs, run the calibration batches."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn

from fxprune.adapters.calls import batch_loss
from fxprune.adapters.protocol import Adapter, Batch, device_of
from fxprune.adapters.registry import choose_adapter, unwrap
from fxprune.attribution.criteria import RegionScore, ScoringInputs, get_criterion
from fxprune.attribution.dataflow import trace_dataflow
from fxprune.attribution.linear_recovery import (
    GramInterpreter,
    GramSums,
    LinearMap,
    linearly_absorbable,
    solve_linear_maps,
)
from fxprune.attribution.recorder import AttributionRecord, RecordingInterpreter, merge_records
from fxprune.datasets.calibration import Calibration, check_same_batches
from fxprune.errors import LossError, ModelError
from fxprune.graph.capture import capture_islands
from fxprune.graph.interpreters import run_with
from fxprune.graph.records import Captured, Link, Region, Rejection
from fxprune.graph.region_finder import find_regions
from fxprune.graph.symbolic_shapes import propagate_symbolic
from fxprune.planning.analysis import Analysis
from fxprune.planning.candidates import build_candidates, build_node_records, without_cost
from fxprune.planning.plan import IslandRecord, Totals
from fxprune.profiling.flops_params import count_flops, count_params, group_parameters
from fxprune.profiling.latency import BACKENDS, UNMEASURED, Latency, backend_copy, check_backend, measure_latency
from fxprune.runtime.distributed import all_gather, on_device, raise_on_all_ranks, run_on_rank_zero
from fxprune.runtime.options import refuse_removed_keywords
from fxprune.runtime.private_copy import check_same_weights, preserve_rng_state, private_copy
from fxprune.runtime.progress import Progress
from fxprune.version import __version__


@refuse_removed_keywords
def analyze(
    model: nn.Module,
    calib_loader: Iterable[Any],
    *,
    criterion: str | RegionScore = "fisher",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    latency_backend: str | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Find what can be removed from a model, what it would save, and how important it is.

    Parameters
    ----------
    model : Module
        A torchvision detector or classifier, an ultralytics model or `YOLO` object, or anything with a `loss`.
        It is not changed; the work is done on a copy in float32.
    calib_loader : iterable
        Batches in the form the kind of model takes (an unknown form raises with the known ones), with labels or
        images alone; then the model's own confident outputs are the targets. Read once.
    criterion : str or callable
        ``"fisher"`` (default), ``"fisher_mended"``, ``"grad_delta"``, ``"grad_act"`` (arXiv 2602.14040), ``"l1"`` (its
        baseline), ``"random"``, or ``callable(region, modules) -> float`` with the region's modules by dotted path; see
        `fxprune.attribution.criteria`. ``"fisher_mended"`` keeps the batches in memory.
    loss : callable, optional
        ``loss(model, batch) -> scalar Tensor``, the mean over the images; for models of no known kind.
    seed : int
        For samplers inside the loss, and for ``criterion="random"``.
    latency_backend : str, optional
        ``"eager"`` or ``"inductor"`` (``torch.compile(dynamic=False)``): measure milliseconds there, of one
        call in float32 on the first batch, with the model's device and torch's threads. Let nothing else run meanwhile.
    progress : callable, optional
        ``progress(stage, done, total)``; `total` is None where it is not known.

    Returns
    -------
    Analysis
        The same in all processes (`torch.distributed`), which share out the batches: call it in each, with the same
        model and loader. One alone measures milliseconds.

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
    study = Study(criterion, loss, seed, progress, latency_backend)
    network = unwrap(model)
    device = device_of(network)
    with on_device(device), preserve_rng_state(network), torch.inference_mode(False), torch.enable_grad():
        return study.run(private_copy(network), calib_loader)


@dataclass(frozen=True)
class Study:
    """Settings of an analysis, checked; see `fxprune.analyze`.

    Raises
    ------
    SettingError
        If one is not known.
    """

    criterion: str | RegionScore
    loss: Callable[[nn.Module, Any], Tensor] | None
    seed: int
    progress: Progress | None = None
    latency_backend: str | None = None

    def __post_init__(self) -> None:
        get_criterion(self.criterion)
        check_backend(self.latency_backend)

    def run(self, model: nn.Module, calib_loader: Any) -> Analysis:
        """Analyze a private copy of a model; it is changed."""
        check_same_weights(model)
        with raise_on_all_ranks():
            calibration = Calibration.of(calib_loader)
            adapter = choose_adapter(model, calibration.first_raw, self.loss)
            adapter.prepare(model)
            first = calibration.first(model, adapter)
            twin = backend_copy(model, BACKENDS[self.latency_backend]) if self.latency_backend else None
            self._say("capture", 0, 1)
            captured = self.capture(model, adapter, first)
            self._say("capture", 1, 1)
            total, nodes = count_flops(lambda: adapter.predict(captured.model, first), captured.graphs)
            flops = {key: value / first.count for key, value in nodes.items()}
            captured = without_cost(captured, flops)
        check_same_batches([first])
        latency = UNMEASURED if twin is None else self._latency(twin, captured, adapter, first)
        record, links = self._record(captured, adapter, calibration)
        name, criterion = get_criterion(self.criterion)
        evidence = ScoringInputs(
            regions=captured.regions,
            record=record,
            modules=dict(captured.model.named_modules()),
            seed=self.seed,
        )
        with raise_on_all_ranks():
            scores = criterion.score(evidence)
        scores = run_on_rank_zero(lambda: scores)
        groups = group_parameters(captured.model, captured.graphs)
        regions, unscored = build_candidates(captured.regions, scores, flops, groups, latency)
        blocks = sum(region.block for region in regions)
        settings = {
            "model": type(model).__name__,
            "criterion": name,
            "seed": self.seed,
            "family": adapter.family,
            "images": record.images,
            "batches": calibration.count,
            "targets": calibration.targets,
            "versions": _library_versions(),
            **({"latency": {"backend": self.latency_backend, **latency.settings}} if twin else {}),
        }
        return Analysis(
            regions=regions,
            rejections=(*captured.rejections, *unscored),
            nodes=tuple(build_node_records(captured.graphs, record, flops)),
            links=links,
            islands=tuple(IslandRecord(i.name, i.fingerprint, i.opaque) for i in captured.islands),
            before=Totals(total / first.count, count_params(captured.model), blocks, latency.whole_ms),
            settings=settings,
            groups=tuple(groups),
        )

    def capture(self, model: nn.Module, adapter: Adapter, first: Batch) -> Captured:
        """Capture a private copy of a model and find its regions.

        Raises
        ------
        ModelError
            If no part of it can be captured.
        """
        model, islands = capture_islands(
            model, lambda network: batch_loss(network, adapter, first, 0, self.seed), adapter.whole_model_is_graph
        )
        if not islands:
            raise ModelError(f"no part of {type(model).__name__} with weights could be traced to an fx graph")
        regions: list[Region] = []
        rejections: list[Rejection] = []
        for island in islands:
            shapes = propagate_symbolic(island.gm, island.call.args, island.call.kwargs)
            found, refused = find_regions(island.name, island.gm, shapes)
            regions += found
            rejections += refused
        return Captured(model, islands, regions, rejections)

    def _record(
        self, captured: Captured, adapter: Adapter, calibration: Calibration
    ) -> tuple[AttributionRecord, tuple[Link, ...]]:
        """One forward and one backward pass per batch, every node recorded; and what the first one links."""
        record = AttributionRecord()
        links: tuple[Link, ...] = ()
        criterion = get_criterion(self.criterion)[1]
        maps = self._maps(captured, adapter, calibration) if criterion.linear_recovery else {}

        def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
            own = [region for region in captured.regions if region.island == island]
            return RecordingInterpreter(gm, island, record, own, criterion.gate, maps)

        with raise_on_all_ranks(), run_with(captured.graphs, make):
            for index, batch in calibration.own(captured.model, adapter):
                run = partial(batch_loss, captured.model, adapter, batch, index, self.seed)
                parts, links = (run(), links) if record.images else trace_dataflow(run, captured.graphs)
                if not parts.requires_grad:
                    raise LossError(f"batch {index}: the loss does not depend on the model's captured layers")
                criterion.loss(parts).backward()  # type: ignore[no-untyped-call]
                record.close_batch(index, batch.count)
                self._say("attribution", index + 1, None)
        calibration.settle()
        record = merge_records(all_gather(record))
        if not record.grad_act:
            raise LossError("no gradient reached any captured layer: the loss does not depend on the model")
        return record, run_on_rank_zero(lambda: links)

    def _maps(self, captured: Captured, adapter: Adapter, calibration: Calibration) -> Mapping[str, LinearMap]:
        """What stands in for regions once they are mended: one forward pass per batch, and another of the first."""
        calibration.keep(captured.model, adapter)
        sums: GramSums = {}
        with raise_on_all_ranks(), torch.no_grad():
            regions: list[Region] | None = None
            for index, batch in calibration.own(captured.model, adapter):
                run = partial(batch_loss, captured.model, adapter, batch, index, self.seed)
                if regions is None:
                    with torch.enable_grad(), run_with(captured.graphs, _make_tracking_interpreter):
                        links = trace_dataflow(run, captured.graphs)[1]
                    regions = list(linearly_absorbable(captured.graphs, links, captured.regions))
                with run_with(captured.graphs, partial(_make_gram_interpreter, regions, sums)):
                    run()
                self._say("stand-ins", index + 1, None)
        return solve_linear_maps(sums)

    def _latency(self, twin: nn.Module, captured: Captured, adapter: Adapter, first: Batch) -> Latency:
        """Measured by one process alone."""
        backend, graphs, regions = BACKENDS[str(self.latency_backend)], captured.graphs, captured.regions
        return run_on_rank_zero(
            lambda: measure_latency(backend, twin, captured.model, graphs, regions, adapter, first, tell=self._say)
        )

    def _say(self, stage: str, done: int, total: int | None) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


def _make_tracking_interpreter(island: str, gm: fx.GraphModule) -> fx.Interpreter:
    return RecordingInterpreter(gm, island, AttributionRecord(), ())


def _make_gram_interpreter(
    regions: Sequence[Region], sums: GramSums, island: str, gm: fx.GraphModule
) -> fx.Interpreter:
    return GramInterpreter(gm, [region for region in regions if region.island == island], sums)


def _library_versions() -> dict[str, str]:
    return {
        "fxprune": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
