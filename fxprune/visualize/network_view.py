"""The content of a picture of a network, as plain data: blocks, edges between them, and removals at each budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
from torch import nn

from fxprune.errors import BudgetError
from fxprune.graph.records import IMAGES, RESULTS
from fxprune.planning.analysis import Analysis
from fxprune.planning.plan import Candidate, NodeRecord, Plan, cost_of
from fxprune.rewriting.history import applied_plans

IMAGES_NODE, RESULTS_NODE = -1, -2
"""Positions that mean the input images and the results of the model."""
SIZE_OPERATIONS = {"size", "getattr", "dim"}
"""Operations that return sizes if they return no tensor. Values computed from sizes only are not in pictures."""

Drawable = Analysis | Plan | nn.Module


def build_view(what: Drawable, shown: Plan | None = None) -> dict[str, Any]:
    """Gather the content of a picture of a network.

    Parameters
    ----------
    what : Analysis, Plan or Module
        An analysis has one plan per budget in whole percents. A model that was pruned in steps has one plan per step,
        with all regions removed up to that step.
    shown : Plan, optional
        A plan of the analysis to show first. Its cost is the cost of the other plans too.

    Returns
    -------
    dict
        Plain data for JSON: ``nodes`` and ``edges``, ``blocks`` and ``block_edges`` (`IMAGES_NODE` means the images,
        `RESULTS_NODE` the results), ``regions``, ``rejections``, ``plans``, ``initial`` (the plan
        shown first, or None).

    Raises
    ------
    ModelError
        If a model was not pruned by fxprune.

    Examples
    --------
    >>> picture = build_view(fxprune.analyze(model, loader))     # doctest: +SKIP
    >>> [block["label"] for block in picture["blocks"]]            # doctest: +SKIP
    """
    plans = _plans(what, shown)
    network = what if isinstance(what, (Analysis, Plan)) else plans[0]
    flow = Dataflow(tuple(_visible_nodes(network.nodes)), network)
    names = flow.names
    ascending = sorted(range(len(network.regions)), key=lambda index: network.regions[index].score)
    ranks = {index: rank for rank, index in enumerate(ascending, 1)}
    return {
        "title": str(network.settings.get("model", "")),
        "settings": dict(network.settings),
        "before": vars(network.before),
        "cost": plans[0].cost if plans else "flops",
        "plans": [_plan_row(plan) for plan in plans],
        "initial": _position(plans, shown) if isinstance(what, Analysis) else len(plans) - 1,
        "regions": [
            {**_region_row(region, names), "rank": ranks[index]} for index, region in enumerate(network.regions)
        ],
        "rejections": [vars(rejection) for rejection in network.rejections],
        "nodes": [
            {"id": index, "name": node.name, "op": node.op, "island": node.island, "shape": node.shape,
             "flops": node.flops, "grad_act": node.grad_act, "block": flow.blocks[index]}
            for index, node in enumerate(flow.nodes)
        ],
        "edges": [list(edge) for edge in flow.edges],
        "blocks": list(_block_rows(flow)),
        "block_edges": [list(edge) for edge in _block_edges(flow)],
        "islands": [{"name": island} for island in dict.fromkeys(node.island for node in flow.nodes)],
    }  # fmt: skip


def _plans(what: Drawable, shown: Plan | None) -> list[Plan]:
    if isinstance(what, Plan):
        return [what]
    if isinstance(what, Analysis):
        cost, own = (shown.cost, [shown]) if shown else ("flops", [])
        others = [plan for plan in _plans_by_percent(what, cost) if not shown or plan.budget != shown.budget]
        return sorted([*own, *others], key=lambda plan: plan.budget)
    return _accumulate_plans(applied_plans(what))


def _accumulate_plans(plans: Sequence[Plan]) -> list[Plan]:
    """Return plans of the first network; each also removes the regions of the plans before it.

    If a removed region is not in the first network, only the last plan is returned, without change.
    """
    first, gone, found, blocks = plans[0], set[str](), [], plans[0].before.blocks
    for plan in plans if len(plans) > 1 else ():
        gone |= {region.name for region in plan.removed}
        blocks -= plan.before.blocks - plan.after.blocks
        after = replace(plan.after, blocks=blocks)
        regions = tuple(replace(region, removed=region.name in gone) for region in first.regions)
        share = 1 - (cost_of(after, first.cost) or 0.0) / (cost_of(first.before, first.cost) or 1.0)
        settings = first.settings.without("loss_increase")
        found.append(replace(first, settings=settings, regions=regions, after=after, budget=share))
    return found if found and gone <= {region.name for region in first.regions} else [plans[-1]]


def _position(plans: Sequence[Plan], shown: Plan | None) -> int | None:
    return next((index for index, plan in enumerate(plans) if plan is shown), None)


def _plans_by_percent(analysis: Analysis, cost: str) -> Iterator[Plan]:
    floor = analysis.settings.latency_floor if cost == "latency" else 0.0
    for percent in range(max(math.ceil(100 * floor), 1), 100):
        try:
            yield analysis.plan(percent / 100, cost)
        except BudgetError:
            return


def _plan_row(plan: Plan) -> dict[str, Any]:
    removed = [index for index, region in enumerate(plan.regions) if region.removed]
    return {"budget": plan.budget, "removed": removed, "after": vars(plan.after)}


def _region_row(region: Candidate, names: dict[tuple[str, str], int]) -> dict[str, Any]:
    return {
        "name": region.name, "kind": region.kind, "score": region.score, "flops": region.flops,
        "params": region.params, "latency_ms": region.latency_ms, "layers": list(region.layers),
        "nodes": _node_positions(region, names),
        "exit": names[region.island, region.exit], "stand_in": names.get((region.island, region.stand_in)),
    }  # fmt: skip


def _node_positions(region: Candidate, names: dict[tuple[str, str], int]) -> list[int]:
    return [names[region.island, node] for node in region.nodes if (region.island, node) in names]


def _visible_nodes(nodes: Sequence[NodeRecord]) -> Iterator[NodeRecord]:
    """Omit inputs and outputs of islands, and arithmetic on sizes."""
    sizes: set[tuple[str, str]] = set()
    for node in nodes:
        of_sizes = bool(node.reads) and all((node.island, name) in sizes for name in node.reads)
        if node.shape is None and (node.op in SIZE_OPERATIONS or of_sizes):
            sizes.add((node.island, node.node))
        elif node.op not in ("input", "output"):
            yield node


@dataclass(frozen=True)
class Dataflow:
    """Nodes of a whole model, the edges between them, and their blocks.

    Attributes
    ----------
    nodes : tuple of NodeRecord
        Nodes without the inputs and outputs of islands; edges connect their neighbours directly.
    network : Analysis or Plan
        The source of the nodes.
    """

    nodes: tuple[NodeRecord, ...]
    network: Analysis | Plan

    @cached_property
    def names(self) -> dict[tuple[str, str], int]:
        """Return the position of every node."""
        return {(node.island, node.node): index for index, node in enumerate(self.nodes)}

    @cached_property
    def edges(self) -> list[tuple[int, int]]:
        """Return pairs of positions, also of `IMAGES_NODE` and `RESULTS_NODE`."""
        found: dict[tuple[int, int], None] = {}
        for index, node in enumerate(self.nodes):
            for name in node.reads:
                found |= {(source, index): None for source in self._value_sources(node.island, name)}
        read = {source for source, _ in found}
        ends = [*self._island_inputs(RESULTS), *(index for index in range(len(self.nodes)) if index not in read)]
        found |= {(source, RESULTS_NODE): None for source in ends if source != IMAGES_NODE}
        return list(found)

    @cached_property
    def islands(self) -> nx.DiGraph:
        """Return the graph of values between islands; without links that close a cycle (shared heads)."""
        graph: nx.DiGraph = nx.DiGraph()
        for link in self.network.links:
            if not (graph.has_node(link.target) and graph.has_node(link.source)) or not nx.has_path(
                graph, link.target, link.source
            ):
                graph.add_edge(link.source, link.target)
        return graph

    def _island_inputs(self, island: str) -> list[int]:
        """Return the positions of the nodes whose values are the inputs of an island."""
        found: dict[int, None] = {}
        for source in self.islands.predecessors(island) if island in self.islands else [IMAGES]:
            found |= dict.fromkeys([IMAGES_NODE] if source == IMAGES else self._island_outputs(source))
        return list(found)

    def _island_outputs(self, island: str) -> list[int]:
        """Return the positions of the nodes whose values an island outputs.

        If an output is an input of the island, the positions are those of the nodes before the island.
        """
        outputs = [node for node in self.network.nodes if node.island == island and node.op == "output"]
        found: dict[int, None] = {}
        for name in (name for node in outputs for name in node.reads):
            found |= dict.fromkeys(self._value_sources(island, name))
        return list(found)

    def _value_sources(self, island: str, name: str) -> list[int]:
        """Return the positions of the visible nodes, in any island, that produce a value read in this island."""
        if (island, name) in self.names:
            return [self.names[island, name]]
        return self._island_inputs(island) if (island, name) in self.inputs else []

    @cached_property
    def inputs(self) -> set[tuple[str, str]]:
        """Return the input nodes of all islands."""
        return {(node.island, node.node) for node in self.network.nodes if node.op == "input"}

    @cached_property
    def owners(self) -> dict[int, Candidate]:
        """Return the outermost region of every node that is in one; of two that overlap, the first."""
        found: dict[int, Candidate] = {}
        for region in self.network.regions:
            inside = _node_positions(region, self.names)
            if region.block and not any(index in found for index in inside):
                found |= dict.fromkeys(inside, region)
        return found

    @cached_property
    def blocks(self) -> list[int]:
        """Return the block of every node.

        An outermost region is a block. A node without FLOPs belongs to the block that it reads, if it reads one block
        only, and that block is in the same island and is not a region. Every other node starts a block.
        """
        sources: dict[int, set[int]] = {index: set() for index in range(len(self.nodes))}
        for source, target in self.edges:
            if target != RESULTS_NODE:
                sources[target].add(source)
        blocks: list[int] = []
        heads: list[int] = []  # the first node of every block
        of_region: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            block = len(heads)
            read = {blocks[source] if IMAGES_NODE < source < index else IMAGES_NODE for source in sources[index]}
            only = read.pop() if len(read) == 1 else IMAGES_NODE
            if index in self.owners:
                block = of_region.setdefault(self.owners[index].name, block)
            elif only != IMAGES_NODE and not node.flops and heads[only] not in self.owners:
                block = only if self.nodes[heads[only]].island == node.island else block
            if block == len(heads):
                heads.append(index)
            blocks.append(block)
        return blocks


def _block_rows(flow: Dataflow) -> Iterator[dict[str, Any]]:
    reasons = {rejection.name: rejection.reason for rejection in flow.network.rejections}
    regions = {region.name: index for index, region in enumerate(flow.network.regions)}
    members: dict[int, list[int]] = {}
    for index, block in enumerate(flow.blocks):
        members.setdefault(block, []).append(index)
    for block, inside in sorted(members.items()):
        nodes, region = [flow.nodes[index] for index in inside], flow.owners.get(inside[0])
        working = [node for node in nodes if node.flops]
        refused = next((reasons[node.name] for node in nodes if node.name in reasons), None)
        yield {
            "id": block,
            "label": region.name if region else _layer(working[0], flow) if working else _summary(nodes),
            "region": None if region is None else regions[region.name],
            "nodes": inside,
            "island": nodes[0].island,
            "glue": not working,
            "summary": _summary(nodes),
            "reason": None if region else refused,
            "flops": sum(node.flops for node in nodes),
            "params": region.params if region else None,
        }


def _layer(node: NodeRecord, flow: Dataflow) -> str:
    """Return the layer name of a node; a layer that is an island by itself has the name of the island."""
    alone = sum(bool(other.flops) for other in flow.nodes if other.island == node.island) == 1
    return node.island if alone and node.name == f"{node.island}.{node.node}" else node.name


def _summary(nodes: Sequence[NodeRecord]) -> str:
    ops = dict.fromkeys(node.op for node in nodes)
    return " · ".join([op for op in ops if op != "getitem"] or ops)


def _block_edges(flow: Dataflow) -> list[tuple[int, int]]:
    """Return the pairs of connected blocks, each once."""
    of = {IMAGES_NODE: IMAGES_NODE, RESULTS_NODE: RESULTS_NODE, **dict(enumerate(flow.blocks))}
    pairs = dict.fromkeys((of[source], of[target]) for source, target in flow.edges)
    return [pair for pair in pairs if pair[0] != pair[1]]
