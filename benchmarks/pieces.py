"""Regions by themselves: cut out of a captured graph, with the values they were fed, to be run and timed alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture import Island
from fxprune.interpreting import interpreted
from fxprune.plan import Candidate


@dataclass(eq=False)
class Piece:
    """A region as a module of its own.

    Attributes
    ----------
    name : str
        Of the region.
    module : callable
        Takes the values that the region reads from outside.
    calls : list of tuple
        What it was given, once for every time the model runs it.
    """

    name: str
    module: Callable[..., object]
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def run(self) -> None:
        """Run it as often as the model does."""
        for call in self.calls:
            self.module(*call)


def cut_out(model: nn.Module, islands: Sequence[Island], regions: Iterable[Candidate], batch: Any) -> list[Piece]:
    """Cut regions out of a captured model, and run it once on a batch to see what they are fed.

    Parameters
    ----------
    model : Module
        With its islands in place, in eval mode.
    islands : sequence of Island
        As captured.
    regions : iterable of Candidate
        Of a plan for this model.
    batch
        What the model takes at inference.

    Returns
    -------
    list of Piece
        In the order of the regions.
    """
    graphs = {island.name: island.gm for island in islands}
    pieces: list[Piece] = []
    read: dict[str, list[tuple[Piece, list[str]]]] = defaultdict(list)
    for region in regions:
        module, inputs = separate(graphs[region.island], region)
        pieces.append(Piece(region.name, module))
        read[region.island].append((pieces[-1], inputs))
    touched = [(name, graphs[name]) for name in read]
    with interpreted(touched, lambda name, gm: _Feeding(gm, read[name])), torch.inference_mode():
        model(batch)
    return pieces


def separate(gm: fx.GraphModule, region: Candidate) -> tuple[fx.GraphModule, list[str]]:
    """Copy a region's nodes into a graph of their own; returns its module and the names of the nodes that feed it."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inside = [node for node in gm.graph.nodes if node.name in region.nodes]
    sources = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in inside)
    inputs = [source for source in sources if source.op != "get_attr"]
    copies |= {source: graph.placeholder(source.name) for source in inputs}
    for node in [*(source for source in sources if source.op == "get_attr"), *inside]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(next(copies[node] for node in inside if node.name == region.exit))
    return fx.GraphModule(gm, graph), [source.name for source in inputs]


class _Feeding(fx.Interpreter):
    """Runs a graph and notes what its pieces are fed."""

    def __init__(self, gm: fx.GraphModule, read: list[tuple[Piece, list[str]]]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.read = read
        self.named = {node.name: node for node in gm.graph.nodes}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, then look the values up."""
        value = super().run(*args, **kwargs)
        for piece, inputs in self.read:
            piece.calls.append(tuple(self.env[self.named[name]] for name in inputs))
        return value


def prepared(pieces: Iterable[Piece], prepare: Callable[[Any], Callable[..., object]]) -> list[Piece]:
    """The same pieces with their modules prepared, as by `torch.compile`."""
    return [Piece(piece.name, prepare(piece.module), piece.calls) for piece in pieces]
