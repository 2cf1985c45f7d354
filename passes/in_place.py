"""Removes in-place operations from a graph, and restores them where this is safe."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph.operators import functional_form, in_place_functions, is_in_place

VIEW_OPERATIONS = frozenset(
    {"getitem", "chunk", "split", "view", "reshape", "transpose", "permute", "flatten", "unbind", "detach", "squeeze"}
    | {"unsqueeze", "expand", "narrow", "select", "t", "contiguous"}
)
"""Operations whose output may share memory with their input."""


def functionalize(gm: fx.GraphModule, names: Collection[str]) -> PassResult:
    """Replaces operations that overwrite one of the named values by operations that compute a new value.

    Later readers of the overwritten value read the new value. Operations on the graph's inputs and on views stay:
    other code can see that these are overwritten.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    names : collection of str
        Names of values whose readers a bypass will change.

    Returns
    -------
    PassResult
        `modified` is True if any operation changed.

    Examples
    --------
    >>> gm = fx.symbolic_trace(lambda x: (x + 1).relu_())
    >>> functionalize(gm, ["add"]).modified, gm.graph.output_node().args[0].target
    (True, 'relu')
    """
    modified = False
    for node in list(gm.graph.nodes):
        if not is_in_place(node.op, node.target, node.args, node.kwargs):
            continue
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or target.name not in names:
            continue
        if target.op in ("placeholder", "get_attr") or _target_name(target) in VIEW_OPERATIONS:
            continue
        node.target, node.args, node.kwargs = functional_form(node.op, node.target, node.args, dict(node.kwargs))
        later = {user for user in target.users if user is not node and user > node}
        target.replace_all_uses_with(node, delete_user_cb=later.__contains__)
        modified = True
    gm.recompile()
    return PassResult(gm, modified)


def reinplace(gm: fx.GraphModule) -> PassResult:
    """Replaces functions by the in-place functions of the traced program, if the overwritten value has no other reader.

    Parameters
    ----------
    gm : GraphModule
        A captured graph, functional; rewritten in place.

    Returns
    -------
    PassResult
        `modified` is True if any function changed.

    Examples
    --------
    >>> reinplace(gm).modified                                     # doctest: +SKIP
    True
    """
    modified = False
    for node, written in in_place_functions(gm):
        node.target, modified = written, True
    gm.recompile()
    return PassResult(gm, modified)


def _target_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
