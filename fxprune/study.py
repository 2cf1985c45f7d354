"""One look at a model: capture it, find its regions, count its costs, run the calibration batches."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn

from fxprune.analysis import Analysis
from fxprune.attribution import AblationInterpreter, Record, RecordingInterpreter, merged
from fxprune.calibration import Calibration, check_same, take_loss
from fxprune.candidates import candidates, node_records
from fxprune.capture import Island, capture
from fxprune.costs import count_flops, count_params, group_parameters
from fxprune.criteria import Evidence, RegionScore, criterion_named, part_sizes
from fxprune.detectors.batch import Adapter, Batch, narrower
from fxprune.detectors.choice import choose_adapter
from fxprune.errors import LossError, ModelError, NoRegionError, SettingError
from fxprune.interpreting import interpreted, record_sizes
from fxprune.isolation import check_same_weights
from fxprune.latency import BACKENDS, UNMEASURED, Latency, check_backend, measure_latency, ready_twin
from fxprune.links import follow
from fxprune.plan import IslandRecord, Link, Totals
from fxprune.ranks import by_first, failing_together, gathered, summed
from fxprune.regions import Region, Rejection, find_regions
from fxprune.shapes import propagate
from fxprune.standins import LinearMap, SummingInterpreter, Sums, absorbed, nearest_maps
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
    shapes: str
    seed: int
    progress: Progress | None = None
    latency_backend: str | None = None
    _kept: list[tuple[int, Batch, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        criterion_named(self.criterion)
        if self.shapes not in ("proved", "sampled"):
            raise SettingError(f"shapes {self.shapes!r} is not known; known: 'proved', 'sampled'")
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
            loss_increase=lambda region: self._loss_increase(captured, adapter, region),
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
            "shapes": self.shapes,
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
        second: dict[tuple[str, str], Any] = {}
        if self.shapes == "sampled":
            second = _sizes_at_second_size(model, islands, adapter, first)
        regions: list[Region] = []
        rejections: list[Rejection] = []
        for island in islands:
            shapes = propagate(island.gm, island.call.args, island.call.kwargs)
            sampled = {node: size for (name, node), size in second.items() if name == island.name}
            found, refused = find_regions(island.name, island.gm, shapes, sampled or None)
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
                if criterion.keeps_batches:
                    self._kept.append((index, batch, parts.detach()))
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

    def _loss_increase(self, captured: Captured, adapter: Adapter, region: Region) -> float:
        """How much the parts of the loss grow with a region bypassed, each relative to its own size."""
        graph = [(name, gm) for name, gm in captured.graphs if name == region.island]
        bypassed = interpreted(graph, lambda _, gm: AblationInterpreter(gm, [region]))
        sums = torch.zeros((), dtype=torch.float64)
        with failing_together(), bypassed, torch.no_grad():
            for index, batch, before in self._kept:
                after = take_loss(captured.model, adapter, batch, index, self.seed)
                sums = sums + batch.count * torch.stack([before, after]).double().cpu()
        before, after = summed(sums) / sum(gathered(sum(batch.count for _, batch, _ in self._kept)))
        self._say("ablation", list(captured.regions).index(region) + 1, len(captured.regions))
        return float(((after - before) / part_sizes(before)).sum())

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


def _sizes_at_second_size(model: nn.Module, islands: Sequence[Island], adapter: Adapter, first: Batch) -> Any:
    """Shapes of every node at a second image size.

    Raises
    ------
    SettingError
        If the model does not run at another size.
    """
    graphs = [(island.name, island.gm) for island in islands]
    other = narrower(first)
    try:
        return record_sizes(lambda: adapter.predict(model, other), graphs)
    except Exception as error:  # a model made for one size may refuse another in any way of its own
        raise SettingError(
            f"shapes='sampled' runs the model at a second image size, and it failed there: {error}"
        ) from error


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
    rows = [f"  {rejection.name}: {rejection.reason}" for rejection in rejections[:20]]
    more = [f"  ... and {len(rejections) - 20} more"] if len(rejections) > 20 else []
    return NoRegionError("\n".join([f"nothing in {type(model).__name__} can be removed:", *rows, *more]))


def _versions() -> dict[str, str]:
    return {
        "fxprune": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
