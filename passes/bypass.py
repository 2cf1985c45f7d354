"""Removes regions from a graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult


def bypass_regions(gm: fx.GraphModule, stand_ins: Mapping[str, str]) -> PassResult:
    """Replaces the output value of each region by its stand-in value.

    The stand-in of a bypass is the input value of the region. The stand-in of a drop is the operand of the addition
    that stays. The nodes of the regions become dead code; `remove_dead_code` erases them.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    stand_ins : mapping of str to str
        Name of each region's exit node, and name of the node that is read instead. A stand-in may itself be the exit
        of another region.

    Returns
    -------
    PassResult
        `modified` is True if any reader changed.

    Raises
    ------
    KeyError
        If a node is not in the graph.

    Examples
    --------
    >>> from torch import nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    >>> bypass_regions(gm, {"_1": "input_1"}).modified
    True
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
