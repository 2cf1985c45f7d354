"""One look at a model: capture it, find its regions, count its costs, run the calibration batches."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn

from fxprune.analysis import Analysis
from fxprune.attribution import Record, RecordingInterpreter, merged
from fxprune.calibration import Calibration, check_same, take_loss
from fxprune.candidates import candidates, node_records
from fxprune.capture import Island, capture
from fxprune.costs import count_flops, count_params, group_parameters
from fxprune.criteria import Evidence, RegionScore, criterion_named
from fxprune.detectors.batch import Adapter, Batch
from fxprune.detectors.choice import choose_adapter
from fxprune.errors import LossError, ModelError, NoRegionError
from fxprune.interpreting import interpreted
from fxprune.isolation import check_same_weights
from fxprune.latency import BACKENDS, UNMEASURED, Latency, check_backend, measure_latency, ready_twin
from fxprune.links import follow
from fxprune.plan import IslandRecord, Link, Totals
from fxprune.ranks import by_first, failing_together, gathered
from fxprune.regions import Region, Rejection, find_regions
from fxprune.shapes import propagate
from fxprune.standins import LinearMap, SummingInterpreter, Sums, absorbed, nearest_maps
from fxprune.text import first_few
from fxprune.version import __version__

Progress = Callable[[str, int, int | None], None]
"""``progress(stage, done, total)``; `total` is None where it is not known."""


def unheard(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True)
class Captured:
    """A model with its islands in place, its regions, and what does not depend on the criterion."""

    model: nn.Module
    islands: Sequence[Island]
    regions: Sequence[Region]
    rejections: Sequence[Rejection]

    @property
    def graphs(self) -> list[tuple[str, fx.GraphModule]]:
        """Name and graph of each island."""
        return [(island.name, island.gm) for island in self.islands]


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
        criterion_named(self.criterion)
        check_backend(self.latency_backend)

    def run(self, model: nn.Module, calib_loader: Any) -> Analysis:
        """Analyze a private copy of a model; it is changed."""
        check_same_weights(model)
        with failing_together():
            calibration = Calibration.of(calib_loader)
            adapter = choose_adapter(model, calibration.first_raw, self.loss)
            adapter.prepare(model)
            first = calibration.first(model, adapter)
            twin = ready_twin(model, BACKENDS[self.latency_backend]) if self.latency_backend else None
            self._say("capture", 0, 1)
            captured = self.capture(model, adapter, first)
            self._say("capture", 1, 1)
            total, nodes = count_flops(lambda: adapter.predict(captured.model, first), captured.graphs)
            flops = {key: value / first.count for key, value in nodes.items()}
            captured = _without_cost(captured, flops)
        check_same([first])
        latency = UNMEASURED if twin is None else self._latency(twin, captured, adapter, first)
        record, links = self._record(captured, adapter, calibration)
        name, criterion = criterion_named(self.criterion)
        evidence = Evidence(
            regions=captured.regions,
            record=record,
            modules=dict(captured.model.named_modules()),
            seed=self.seed,
        )
        with failing_together():
            scores = criterion.score(evidence)
        scores = by_first(lambda: scores)
        groups = group_parameters(captured.model, captured.graphs)
        regions, unscored = candidates(captured.regions, scores, flops, groups, latency)
        blocks = sum(region.block for region in regions)
        settings = {
            "model": type(model).__name__,
            "criterion": name,
            "seed": self.seed,
            "family": adapter.family,
            "images": record.images,
            "batches": calibration.count,
            "targets": calibration.targets,
            "versions": _versions(),
            **({"latency": {"backend": self.latency_backend, **latency.settings}} if twin else {}),
        }
        return Analysis(
            regions=regions,
            rejections=(*captured.rejections, *unscored),
            nodes=tuple(node_records(captured.graphs, record, flops)),
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
        model, islands = capture(
            model, lambda network: take_loss(network, adapter, first, 0, self.seed), adapter.root_is_function
        )
        if not islands:
            raise ModelError(f"no part of {type(model).__name__} with weights could be traced to an fx graph")
        regions: list[Region] = []
        rejections: list[Rejection] = []
        for island in islands:
            shapes = propagate(island.gm, island.call.args, island.call.kwargs)
            found, refused = find_regions(island.name, island.gm, shapes)
            regions += found
            rejections += refused
        return Captured(model, islands, regions, rejections)

    def _record(
        self, captured: Captured, adapter: Adapter, calibration: Calibration
    ) -> tuple[Record, tuple[Link, ...]]:
        """One forward and one backward pass per batch, every node recorded; and what the first one links."""
        record = Record()
        links: tuple[Link, ...] = ()
        criterion = criterion_named(self.criterion)[1]
        maps = self._maps(captured, adapter, calibration) if criterion.mended else {}

        def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
            own = [region for region in captured.regions if region.island == island]
            return RecordingInterpreter(gm, island, record, own, criterion.gate, maps)

        with failing_together(), interpreted(captured.graphs, make):
            for index, batch in calibration.own(captured.model, adapter):
                run = partial(take_loss, captured.model, adapter, batch, index, self.seed)
                parts, links = (run(), links) if record.images else follow(run, captured.graphs)
                if not parts.requires_grad:
                    raise LossError(f"batch {index}: the loss does not depend on the model's captured layers")
                criterion.loss(parts).backward()  # type: ignore[no-untyped-call]
                record.close_batch(index, batch.count)
                self._say("attribution", index + 1, None)
        calibration.settle()
        record = merged(gathered(record))
        if not record.nodes:
            raise LossError("no gradient reached any captured layer: the loss does not depend on the model")
        return record, by_first(lambda: links)

    def _maps(self, captured: Captured, adapter: Adapter, calibration: Calibration) -> Mapping[str, LinearMap]:
        """What stands in for regions once they are mended: one forward pass per batch, and another of the first."""
        calibration.keep(captured.model, adapter)
        sums: Sums = {}
        with failing_together(), torch.no_grad():
            regions: list[Region] | None = None
            for index, batch in calibration.own(captured.model, adapter):
                run = partial(take_loss, captured.model, adapter, batch, index, self.seed)
                if regions is None:
                    with torch.enable_grad(), interpreted(captured.graphs, _tracking):
                        links = follow(run, captured.graphs)[1]
                    regions = list(absorbed(captured.graphs, links, captured.regions))
                with interpreted(captured.graphs, partial(_summing, regions, sums)):
                    run()
                self._say("stand-ins", index + 1, None)
        return nearest_maps(sums)

    def _latency(self, twin: nn.Module, captured: Captured, adapter: Adapter, first: Batch) -> Latency:
        """Measured by one process alone."""
        backend, graphs, regions = BACKENDS[str(self.latency_backend)], captured.graphs, captured.regions
        return by_first(
            lambda: measure_latency(backend, twin, captured.model, graphs, regions, adapter, first, tell=self._say)
        )

    def _say(self, stage: str, done: int, total: int | None) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


def _tracking(island: str, gm: fx.GraphModule) -> fx.Interpreter:
    return RecordingInterpreter(gm, island, Record(), ())


def _summing(regions: Sequence[Region], sums: Sums, island: str, gm: fx.GraphModule) -> fx.Interpreter:
    return SummingInterpreter(gm, [region for region in regions if region.island == island], sums)


def _without_cost(captured: Captured, flops: dict[tuple[str, str], float]) -> Captured:
    """Take out the regions that do no work at inference. Raises `NoRegionError` if none is left."""
    idle = [r for r in captured.regions if not sum(flops.get((r.island, node), 0.0) for node in r.nodes)]
    reason = "it does no floating point work at inference on the first calibration batch"
    rejections = [*captured.rejections, *(Rejection(region.name, reason) for region in idle)]
    regions = [region for region in captured.regions if region not in idle]
    if not regions:
        raise _no_region(captured.model, rejections)
    return Captured(captured.model, captured.islands, regions, rejections)


def _no_region(model: nn.Module, rejections: Sequence[Rejection]) -> NoRegionError:
    rows = first_few([f"\n  {rejection.name}: {rejection.reason}" for rejection in rejections], most=20, separator="")
    return NoRegionError(f"nothing in {type(model).__name__} can be removed:{rows}")


def _versions() -> dict[str, str]:
    return {
        "fxprune": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
