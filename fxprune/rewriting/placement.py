"""Removes regions from the module tree at the smallest place each, and checks the result against the whole graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxprune.graph.records import Region
from fxprune.rewriting.edits import Edits, Placement
from fxprune.rewriting.places import Place, PlaceFinder
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
    attempts = _Attempts(shell, path, rewriter, regions)
    everything = range(len(regions))
    for _ in range(MAX_ROUNDS):
        if any(attempts.place(index) == attempts.whole for index in everything):
            break
        placement = attempts.make(everything)
        if placement is not None:
            return placement
        for index in attempts.failing() or everything:
            attempts.chosen[index] += 1
    return Edits(shell, path, rewriter).make(regions, [attempts.whole] * len(regions), attempts.rewritten(everything))


class _Attempts:
    """Tries the chosen place of each region; what does not compute the same is undone."""

    def __init__(self, shell: nn.Module, path: str, rewriter: IslandRewriter, regions: Sequence[Region]) -> None:
        self.shell, self.path, self.rewriter, self.regions = shell, path, rewriter, regions
        self.places = PlaceFinder(shell.get_submodule(path), rewriter).find(regions)
        self.whole = self.places[0][-1]
        self.chosen = [0] * len(regions)
        self._rewritten: dict[tuple[int, ...], SimplifiedGraph] = {}

    def place(self, index: int) -> Place:
        """The place that is chosen for a region now."""
        return self.places[index][self.chosen[index]]

    def rewritten(self, indices: Sequence[int]) -> SimplifiedGraph:
        """The graph of the whole island without some regions; made once."""
        key = tuple(indices)
        if key not in self._rewritten:
            self._rewritten[key] = self.rewriter.rewrite([self.regions[index] for index in key])
        return self._rewritten[key]

    def make(self, indices: Sequence[int]) -> Placement | None:
        """Remove some regions at their places; None, with nothing changed, if that computes something else."""
        edits = Edits(self.shell, self.path, self.rewriter)
        regions = [self.regions[index] for index in indices]
        if edits.succeed(regions, [self.place(index) for index in indices], self.rewritten(indices)):
            return edits.placement
        edits.undo()
        return None

    def works(self, indices: Sequence[int]) -> bool:
        """Whether some regions can be removed at their places; nothing is changed."""
        placement = self.make(indices)
        if placement is not None:
            placement.undo()
        return placement is not None

    def failing(self) -> list[int]:
        """The regions that fail by themselves, else those that fail with the others of their next larger place."""
        indices = range(len(self.regions))
        alone = [index for index in indices if not self.works([index])] if len(self.regions) > 1 else []
        if alone:
            return alone
        groups: dict[str, list[int]] = {}
        for index in indices:
            groups.setdefault(self.places[index][self.chosen[index] + 1].path, []).append(index)
        return [index for group in groups.values() if not self.works(group) for index in group]
