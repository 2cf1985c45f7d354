"""Removes regions from the module tree at the smallest place each, and checks the result against the whole graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxprune.graph.records import Region
from fxprune.rewriting.edits import Edits, Placement
from fxprune.rewriting.places import PlaceFinder
from fxprune.rewriting.whole_graph import IslandRewriter, SimplifiedGraph

MAX_ROUNDS = 20
"""Places are made larger at most this often before the whole island becomes one graph."""


def remove_regions(shell: nn.Module, path: str, rewriter: IslandRewriter, regions: Sequence[Region]) -> Placement:
    """Remove regions from an island, each at the smallest place that computes what the whole rewritten graph computes.

    Parameters
    ----------
    shell : Module
        The model, as a part of an outer module; changed.
    path : str
        Path of the island in it.
    rewriter : IslandRewriter
        Rewrites the island's graph as a whole.
    regions : sequence of Region
        Regions to remove; not empty.

    Returns
    -------
    Placement

    Raises
    ------
    PlanError
        If a removed node is still read.
    """
    places = PlaceFinder(shell.get_submodule(path), rewriter).find(regions)
    whole = places[0][-1]
    chosen = [0] * len(regions)
    rewritten: dict[tuple[int, ...], SimplifiedGraph] = {}

    def rewrite(indices: Sequence[int]) -> SimplifiedGraph:
        key = tuple(indices)
        if key not in rewritten:
            rewritten[key] = rewriter.rewrite([regions[index] for index in key])
        return rewritten[key]

    def works(indices: Sequence[int]) -> Placement | None:
        edits = Edits(shell, path, rewriter)
        some = [regions[index] for index in indices]
        if edits.succeed(some, [places[index][chosen[index]] for index in indices], rewrite(indices)):
            return edits.placement
        edits.undo()
        return None

    def works_alone(indices: Sequence[int]) -> bool:
        placement = works(indices)
        if placement is not None:
            placement.undo()
        return placement is not None

    everything = range(len(regions))
    for _ in range(MAX_ROUNDS):
        if any(places[index][chosen[index]] == whole for index in everything):
            break
        placement = works(everything)
        if placement is not None:
            return placement
        groups: dict[str, list[int]] = {}
        for index in everything:
            groups.setdefault(places[index][chosen[index] + 1].path, []).append(index)
        failing = [index for index in everything if not works_alone([index])] if len(regions) > 1 else []
        failing = failing or [index for group in groups.values() if not works_alone(group) for index in group]
        for index in failing or everything:
            chosen[index] += 1
    return Edits(shell, path, rewriter).make(regions, [whole] * len(regions), rewrite(everything))
