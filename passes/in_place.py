"""In-place operations out of a graph, and back where they do no harm."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.graph.operators import in_place_functions
from fxprune.graph.tracer import functional_form, is_in_place

VIEW_OPERATIONS = frozenset(
    {"getitem", "chunk", "split", "view", "reshape", "transpose", "permute", "flatten", "unbind", "detach", "squeeze"}
    | {"unsqueeze", "expand", "narrow", "select", "t", "contiguous"}
)
"""Operations whose value may share memory with their input's."""


def functionalize(gm: fx.GraphModule, names: Collection[str]) -> PassResult:
    """Replaces operations that overwrite one of the named values by ones that compute a new value.

    What reads the overwritten value afterwards reads the new one. Left alone are operations on the graph's inputs and
    on views: there the overwriting is seen elsewhere.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    names : collection of str
        Values that a bypass is about to give other readers, or to take readers from.

    Returns
    -------
    PassResult
        `modified` says whether any operation changed.
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
    """Replaces functions by the in-place ones that the program calls, where nothing else reads what they overwrite.

    Parameters
    ----------
    gm : GraphModule
        A captured graph, functional; rewritten in place.

    Returns
    -------
    PassResult
        `modified` says whether any function changed.
    """
    modified = False
    for node, written in in_place_functions(gm):
        node.target, modified = written, True
    gm.recompile()
    return PassResult(gm, modified)


def _target_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
