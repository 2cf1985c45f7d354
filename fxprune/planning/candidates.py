"""Builds the candidates and the node records of an analysis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fxprune.attribution.captured_model import CapturedModel, no_region_error
from fxprune.attribution.criteria import absolute_weights
from fxprune.attribution.recorder import AttributionRecord
from fxprune.errors import LossError, SettingError
from fxprune.graph.fx_utils import is_constant_node, join_path, operation_name
from fxprune.graph.interpreters import Graphs, NodeName
from fxprune.graph.records import Region, Rejection
from fxprune.planning.plan import Candidate, NodeRecord
from fxprune.profiling.flops_params import ParameterGroup
from fxprune.profiling.latency import Latency

NO_GRADIENT = (
    "no gradient reaches it: the model runs it under torch.no_grad, detaches its output, or computes the loss without"
    ' it; so its importance is not known. criterion="l1" needs no gradient'
)
ZERO_GRADIENT = "no gradient reached it on any calibration batch, so its importance is not known"


def build_candidates(
    captured: CapturedModel,
    scores: dict[str, float],
    record: AttributionRecord,
    groups: Sequence[ParameterGroup],
    latency: Latency,
) -> tuple[tuple[Candidate, ...], list[Rejection]]:
    """Join regions with scores and costs. Regions without a score are rejected and not treated as unimportant.

    Raises
    ------
    SettingError
        If a score is not finite.
    NoRegionError
        If no region has a score; the message lists the reasons.
    LossError
        If the reason is the loss: its gradient is 0 everywhere.
    """
    regions, flops, gradients = captured.regions, captured.flops, record.grad_act
    wrong = next((region.name for region in regions if not abs(scores.get(region.name, 0.0)) < float("inf")), None)
    if wrong is not None:
        raise SettingError(f"the criterion gave {scores[wrong]} for region {wrong!r}; scores must be finite numbers")
    scored = [region for region in regions if region.name in scores]
    refused = [
        Rejection(region.name, ZERO_GRADIENT if (region.island, region.exit) in gradients else NO_GRADIENT)
        for region in regions
        if region.name not in scores
    ]
    if not scored and not any(gradients.values()):
        raise LossError("no region received a gradient: the loss does not depend on the layers that could be removed")
    if not scored:
        raise no_region_error(captured.adapted.module, (*captured.rejections, *refused))
    members = {region.name: {(region.island, node) for node in region.nodes} for region in scored}
    rows = [
        Candidate(
            region=region,
            score=scores[region.name],
            flops=sum(flops.get(key, 0.0) for key in members[region.name]),
            params=sum(group.params for group in groups if members[region.name].issuperset(group.readers)),
            block=not any(_lies_in(region, other) for other in scored),
            latency_ms=latency.regions_ms.get(region.name),
        )
        for region in scored
    ]
    return tuple(rows), refused


def _lies_in(inner: Region, outer: Region) -> bool:
    """Whether a region removes a part of what another removes.

    A branch of a layer may also remove what only it reads and is computed outside of the layer, such as a mask.
    """
    if inner.island != outer.island:
        return False
    first, second = set(inner.nodes), set(outer.nodes)
    return first < second or (bool(first & second) and set(inner.layers) < set(outer.layers))


def build_node_records(
    graphs: Graphs, record: AttributionRecord, flops: Mapping[NodeName, float]
) -> Iterator[NodeRecord]:
    """Yield the record of every node: its operation, scores and operations per image."""
    for island, gm in graphs:
        for node in gm.graph.nodes:
            if is_constant_node(node):
                continue
            key, called = (island, node.name), node.op == "call_module"
            yield NodeRecord(
                name=join_path(island, str(node.target) if called else node.name),
                island=island,
                node=node.name,
                op=operation_name(gm, node),
                reads=tuple(source.name for source in node.all_input_nodes if not is_constant_node(source)),
                shape=record.shapes.get(key),
                grad_act=record.grad_act.get(key),
                l1=(absolute_weights([gm.get_submodule(str(node.target))]) or None) if called else None,
                flops=flops.get(key, 0.0),
            )
