"""Values that the stages hand on: islands, regions, rejections, and links between islands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn


@dataclass(frozen=True)
class RecordedCall:
    """What a module was first called with on the observed batch (`TensorSpec`), and a digest of each output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any] = field(repr=False)


@dataclass(frozen=True)
class Island:
    """A submodule that was captured as one graph.

    Attributes
    ----------
    name : str
        Dotted path in the model; "" is the model itself.
    gm : GraphModule
        The graph over the model's own layers; it stands where the submodule stood.
    opaque : tuple of str
        Paths below the island that stayed one node because they cannot be traced.
    call : Call
        What it was called with.
    fingerprint : str
        Of the graph, before those nested in its opaque parts came to stand there.
    """

    name: str
    gm: fx.GraphModule = field(repr=False)
    opaque: tuple[str, ...]
    call: RecordedCall = field(repr=False)
    fingerprint: str


@dataclass(frozen=True)
class Region:
    """A piece of an island's graph that can be removed.

    Attributes
    ----------
    name : str
        Dotted path in the model, e.g. ``backbone.body.layer3.4``; the shortest that holds its layers and no others.
    kind : str
        ``"bypass"``: readers of the exit read the entry. ``"drop"``: an `add` leaves one operand out.
    island : str
        Path of the island; "" is the model itself.
    exit : str
        Node whose value goes.
    stand_in : str
        Node whose value is read instead: the entry, or the operand that stays.
    nodes : tuple of str
        All nodes that go, in graph order, exit included.
    layers : tuple of str
        Dotted paths, in the model, of the modules with weights and of the weights used as constants that they read.
    """

    name: str
    kind: str
    island: str
    exit: str
    stand_in: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Rejection:
    """Something that looked removable and is not: its `name` and the `reason` in words."""

    name: str
    reason: str


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


IMAGES, RESULTS = "<images>", "<results>"
"""Ends of links: what the model is given, and what it gives."""


@dataclass(frozen=True)
class Link:
    """Data that goes from one island to another through the Python between them.

    Attributes
    ----------
    source : str
        Island that gives it, or `IMAGES`.
    target : str
        Island that takes it, or `RESULTS`.
    """

    source: str
    target: str
