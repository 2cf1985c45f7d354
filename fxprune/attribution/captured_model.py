"""Defines `CapturedModel`: a model with its islands, its regions, and the operations of every node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from fxprune.adapters.calls import AdaptedModel
from fxprune.adapters.protocol import Batch
from fxprune.capture.islands import Run, capture_islands
from fxprune.errors import ModelError, NoRegionError
from fxprune.graph.interpreters import Graphs, NodeName
from fxprune.graph.operators import is_spare_tensor
from fxprune.graph.records import Island, Region, Rejection
from fxprune.graph.region_finder import find_regions
from fxprune.graph.symbolic_shapes import propagate_symbolic
from fxprune.profiling.flops_params import count_flops
from fxprune.profiling.folded_blocks import FoldedBlock, find_folded_blocks, fold_flops, saved_by_folding
from fxprune.runtime.json_text import first_few


@dataclass(frozen=True)
class CapturedModel:
    """A private copy of a model, with the graphs of its islands. Any number of criteria can score it.

    Attributes
    ----------
    adapted : AdaptedModel
        The copy. It keeps its own modules; `run_with` runs the graphs instead of them.
    islands : tuple of Island
        All captured graphs.
    regions : tuple of Region
        Regions that can be removed and that compute something at inference.
    rejections : tuple of Rejection
        Layers and regions that cannot be removed, with the reasons.
    flops : mapping of (str, str) to float
        Floating point operations per image of every node, by island and node name.
    total_flops : float
        Floating point operations per image of the whole model.
    folded : mapping of str to FoldedBlock
        Blocks that are removed as a whole only, by path. Their operations count as after the fold of their branches.
    """

    adapted: AdaptedModel
    islands: tuple[Island, ...]
    regions: tuple[Region, ...]
    rejections: tuple[Rejection, ...]
    flops: Mapping[NodeName, float] = field(default_factory=dict, repr=False)
    total_flops: float = 0.0
    folded: Mapping[str, FoldedBlock] = field(default_factory=dict, repr=False)

    @property
    def graphs(self) -> Graphs:
        """The graphs of the islands."""
        return Graphs.of(self.adapted.module, self.islands)

    def regions_of(self, island: str) -> list[Region]:
        """Return the regions of one island."""
        return [region for region in self.regions if region.island == island]


def capture_model(adapted: AdaptedModel, first: Batch) -> CapturedModel:
    """Capture a model, find its regions and count its operations.

    Parameters
    ----------
    adapted : AdaptedModel
        The adapted copy. Its module is not changed.
    first : Batch
        A batch with targets. The graphs are compared with the modules on it, in the loss and at inference.

    Returns
    -------
    CapturedModel

    Raises
    ------
    ModelError
        If no part of the model can be captured. The message contains the reason.
    NoRegionError
        If nothing in it can be removed. The message lists the reasons.
    """
    captured = find_all_regions(adapted, first)
    total, nodes = count_flops(lambda: captured.adapted.predict(first), captured.graphs)
    total -= saved_by_folding(captured.folded)[0]
    folded = fold_flops(nodes, captured.graphs, captured.folded)
    flops = {name: value / first.count for name, value in folded.items()}
    return _drop_costless(replace(captured, flops=flops, total_flops=total / first.count))


def find_all_regions(adapted: AdaptedModel, first: Batch) -> CapturedModel:
    """Capture a model and find its regions, including those that compute nothing at inference."""
    name = type(adapted.module).__name__
    folded = find_folded_blocks(adapted.module, lambda: adapted.predict(first))
    units = {path: block.unit for path, block in folded.items()}
    runs: list[Run] = [lambda network: replace(adapted, module=network).loss(0, first)]
    if adapted.adapter.predict is not adapted.adapter.loss:
        runs.append(lambda network: replace(adapted, module=network).predict(first))
    islands, rejections = capture_islands(adapted.module, runs, adapted.adapter.whole_model_is_graph)
    if not islands:
        raise ModelError(f"no part of {name} with weights could be traced to an fx graph:{_listed(rejections)}")
    regions: list[Region] = []
    for island in islands:
        shapes = propagate_symbolic(island.gm, island.call.args, island.call.kwargs)
        found, refused = find_regions(island.name, island.gm, shapes, units)
        unsafe = _unsafe_regions(island.gm, found) if island.overwritten else []
        rejections += [Rejection(region.name, OVERWRITTEN) for region in unsafe]
        regions += [region for region in found if region not in unsafe]
        rejections += refused
    return CapturedModel(adapted, tuple(islands), tuple(regions), tuple(rejections), folded=folded)


OVERWRITTEN = "code outside the graph overwrites what it returns; without it, that would be a value that others need"


def _unsafe_regions(gm: fx.GraphModule, regions: Sequence[Region]) -> list[Region]:
    """Return the regions without which a graph would return a value that its caller must not overwrite."""
    nodes = {node.name: node for node in gm.graph.nodes}

    def is_safe(region: Region) -> bool:
        stand_in = nodes[region.stand_in]
        spare = is_spare_tensor(gm, stand_in) and all(user.name in region.nodes for user in stand_in.users)
        return spare and all(is_safe(other) for other in regions if other.exit == region.stand_in)

    last = [region for region in regions if any(user.op == "output" for user in nodes[region.exit].users)]
    return [region for region in last if not is_safe(region)]


def _drop_costless(captured: CapturedModel) -> CapturedModel:
    """Reject the regions that compute nothing at inference. Raises `NoRegionError` if none is left."""
    flops = captured.flops
    idle = [r for r in captured.regions if not sum(flops.get((r.island, node), 0.0) for node in r.nodes)]
    reason = "it does no floating point work at inference on the first calibration batch"
    rejections = (*captured.rejections, *(Rejection(region.name, reason) for region in idle))
    regions = tuple(region for region in captured.regions if region not in idle)
    if not regions:
        raise no_region_error(captured.adapted.module, rejections)
    return replace(captured, regions=regions, rejections=rejections)


def no_region_error(model: nn.Module, rejections: Sequence[Rejection]) -> NoRegionError:
    """Return the error for a model in which nothing can be removed."""
    return NoRegionError(f"nothing in {type(model).__name__} can be removed:{_listed(rejections)}")


def _listed(rejections: Sequence[Rejection]) -> str:
    rows = [f"\n  {rejection.name or '<model>'}: {rejection.reason}" for rejection in rejections]
    return first_few(rows, most=20, separator="")
