"""Regions out of a graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult


def bypass_regions(gm: fx.GraphModule, stand_ins: Mapping[str, str]) -> PassResult:
    """Replaces the value that leaves each region by the value that stands in for it.

    For a bypass that is the value that enters the region, for a drop the operand of the sum that stays. The nodes of
    the regions stay behind as dead code for `remove_dead_code`.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    stand_ins : mapping of str to str
        Name of each region's exit node, and of the node to read instead. Regions may follow one another.

    Returns
    -------
    PassResult
        `modified` says whether any reader changed.

    Raises
    ------
    KeyError
        If a node is not in the graph.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    modified = False
    for name in [name for name in nodes if name in stand_ins] + [name for name in stand_ins if name not in nodes]:
        stand_in = name
        while stand_in in stand_ins:
            stand_in = stand_ins[stand_in]
        modified |= bool(nodes[name].replace_all_uses_with(nodes[stand_in]))
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, modified)
