"""Finds arguments that a module's own forward only passes on to its children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

Places = list[tuple[int, int | str]]
"""Places of an argument in calls: the number of the call, and the position or the keyword in it."""


def passed_on_arguments(module: nn.Module, absent: Sequence[str], paths: Sequence[str]) -> dict[str, Places]:
    """Find arguments, None in all calls so far, with which a module's own forward does nothing but pass them on.

    They may have other values in other calls, as a mask that only a training makes.

    Parameters
    ----------
    module : Module
        The module. Its own forward is traced; its children are not.
    absent : sequence of str
        Names of arguments that were None.
    paths : sequence of str
        Path of the child in each call that the forward makes.

    Returns
    -------
    dict
        The places of each such argument. Others are left out: the forward reads or tests them.

    Examples
    --------
    >>> class Layer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm = nn.Identity()
    ...     def forward(self, x, mask=None, scale=None):
    ...         return self.norm(x, mask) if scale is None else x * scale
    >>> passed_on_arguments(Layer(), ["mask", "scale"], ["norm"])
    {'mask': [(0, 1)]}
    """
    found: dict[str, Places] = {}
    try:
        fixed = _OwnForward().trace(module, dict.fromkeys(absent))
        for name in absent:
            free = _OwnForward().trace(module, dict.fromkeys(other for other in absent if other != name))
            places = _places_in_calls(free, name)
            same = _structure(free, name) == _structure(fixed, name)
            if places is not None and same and [node.target for node in _calls(free)] == list(paths):
                found[name] = places
    except Exception:  # the forward cannot be traced by itself
        return {}
    return found


class _OwnForward(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module"]


def _places_in_calls(graph: fx.Graph, name: str) -> Places | None:
    """Return the places of an argument in calls of children; None if anything else reads it."""
    (argument,) = (node for node in graph.nodes if node.op == "placeholder" and node.target == name)
    places: Places = []
    for number, call in enumerate(_calls(graph)):
        places += [(number, position) for position, value in enumerate(call.args) if value is argument]
        places += [(number, key) for key, value in call.kwargs.items() if value is argument]
    reads: list[fx.Node] = []
    for node in graph.nodes:
        fx.map_arg((node.args, node.kwargs), reads.append)
    return places if reads.count(argument) == len(places) else None


def _is_check(node: fx.Node) -> bool:
    """Whether a node is a check that `torch.fx` adds for a constant: a value and a message go in, nothing comes out."""
    return node.op == "call_function" and not node.users and any(isinstance(value, str) for value in node.args)


def _structure(graph: fx.Graph, name: str) -> list[Any]:
    """Return the operations of a graph, with None in place of an argument, and without the checks of constants."""
    nodes = [node for node in graph.nodes if not _is_check(node)]
    numbers = {node: number for number, node in enumerate(nodes)}

    def describe(node: fx.Node) -> Any:
        return None if node.op == "placeholder" and node.target == name else f"node {numbers[node]}"

    operations = [node for node in nodes if node.op != "placeholder"]
    return [(node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), describe))) for node in operations]
