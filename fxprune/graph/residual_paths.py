"""Follows the result of a module's call back to the value from outside that it continues.

A transformer layer adds branches to its input, one after the other, with norms between (before each branch, or after
each sum). What it adds may depend on other values, such as positions or the output of an encoder. The result continues
the one value that it reaches through sums, norms and activations alone.
"""

from __future__ import annotations

from collections.abc import Collection

import networkx as nx
from torch import fx

from fxprune.graph.operators import ADDITIONS, is_activation, is_norm
from fxprune.graph.symbolic_shapes import SymbolicShapes


def continued_value(
    gm: fx.GraphModule, flow: nx.DiGraph, shapes: SymbolicShapes, exit_: str, members: Collection[str]
) -> tuple[str, set[str]] | None:
    """Find the value from outside of a call that the result of the call continues.

    Parameters
    ----------
    gm : GraphModule
        The graph.
    flow : networkx.DiGraph
        Its values, see `value_graph`.
    shapes : SymbolicShapes
        Their shapes.
    exit_ : str
        Node of the call's result.
    members : collection of str
        Nodes of the call.

    Returns
    -------
    value : str
        Node outside of the call. Its value has provably the shape of the result. Among several, it is the one that
        nothing outside of the call reads: the others are needed elsewhere, as positions are by every layer.
    way : set of str
        Nodes of the call that lie between the value and the result.
    None
        If there is no such value, or not one alone.

    Examples
    --------
    >>> continued_value(gm, flow, shapes, "norm2", layer)         # doctest: +SKIP
    ('hidden', {'add', 'norm1', 'add_1', 'norm2'})
    """
    nodes = {node.name: node for node in gm.graph.nodes if node.name in flow}
    walked, waiting = nx.DiGraph(), [exit_]
    while waiting:
        name = waiting.pop()
        for source in _continued_inputs(gm, nodes[name], nodes):
            if source in members and source not in walked:
                waiting.append(source)
            walked.add_edge(source, name)
    outside = [name for name in walked if name not in members and shapes.provably_equal(name, exit_)]
    if len(outside) > 1:
        outside = [name for name in outside if all(reader in members for reader in flow.successors(name))]
    return (outside[0], nx.descendants(walked, outside[0])) if len(outside) == 1 else None


def _continued_inputs(gm: fx.GraphModule, node: fx.Node, nodes: Collection[str]) -> list[str]:
    """Return the inputs of a node that its value continues: the operands of a sum, what a norm rescales."""
    sources = [source.name for source in node.all_input_nodes if source.name in nodes]
    if node.target in ADDITIONS:
        return sources
    return sources[:1] if is_norm(gm, node) or is_activation(gm, node) else []
