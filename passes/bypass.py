"""Removes regions from a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult


def bypass_regions(gm: fx.GraphModule, stand_ins: Mapping[str, str], contiguous: Collection[str] = ()) -> PassResult:
    """Replaces the output value of each region by its stand-in value.

    The stand-in of a bypass is the input value of the region. The stand-in of a drop is the operand of the addition
    that stays. The nodes of the regions become dead code; `remove_dead_code` erases them.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    stand_ins : mapping of str to str
        Name of each region's exit node, and name of the node that is read instead. A stand-in may itself be the exit
        of another region that comes before.
    contiguous : collection of str
        Exit nodes whose stand-in is made contiguous first, by a node at the place of the exit.

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
    replaced: dict[str, fx.Node] = {}
    for name in [name for name in nodes if name in stand_ins] + [name for name in stand_ins if name not in nodes]:
        exit_, stand_in = nodes[name], stand_ins[name]
        value = replaced[stand_in] if stand_in in replaced else nodes[stand_in]
        modified |= bool(exit_.users)
        if name in contiguous:
            with gm.graph.inserting_after(exit_):
                value = gm.graph.call_method("contiguous", (value,))
        exit_.replace_all_uses_with(value)
        replaced[name] = value
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, modified)
