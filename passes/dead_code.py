"""Removes the nodes, modules and parameters that no other node reads."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph.fx_utils import has_effect


def remove_dead_code(gm: fx.GraphModule) -> PassResult:
    """Replaces a graph, its modules and its parameters by those that the output needs.

    Torch's `delete_all_unused_submodules` keeps unused parameters and buffers of the modules that stay, such as the
    root. This pass deletes them too.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.

    Returns
    -------
    PassResult
        `modified` is True if any node, parameter or buffer was removed.

    Examples
    --------
    >>> from torch import nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    >>> gm.graph.output_node().args = (next(iter(gm.graph.nodes)),)
    >>> remove_dead_code(gm).modified, list(gm.state_dict())
    (True, [])
    """
    before = (len(gm.graph.nodes), len(gm.state_dict()))
    gm.graph.eliminate_dead_code(is_impure_node=has_effect)
    gm.delete_all_unused_submodules()  # before their tensors: other graphs may call them
    called = {f"{node.target}." for node in gm.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    tensors = [name for name, _ in gm.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in gm.named_buffers(remove_duplicate=False)]
    for name in tensors:
        if name not in read and not any(name.startswith(prefix) for prefix in called):
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, before != (len(gm.graph.nodes), len(gm.state_dict())))


def erase_unused(gm: fx.GraphModule, names: Collection[str]) -> PassResult:
    """Replaces a graph by one without those of the named nodes that no other node reads.

    Unlike `remove_dead_code` it keeps all other nodes, such as updates of statistics that no node reads.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    names : collection of str
        Names of nodes.

    Returns
    -------
    PassResult
        `modified` is True if any node was removed.

    Examples
    --------
    >>> from torch import nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    >>> erase_unused(gm, ["_0"]).modified  # the output reads it
    False
    """
    before = len(gm.graph.nodes)
    for node in reversed(list(gm.graph.nodes)):
        if node.name in names and not node.users:
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return PassResult(gm, before != len(gm.graph.nodes))
