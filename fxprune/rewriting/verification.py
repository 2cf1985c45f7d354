"""Checks the graphs and the remaining weights of a rewritten model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from fxprune.errors import PlanError
from fxprune.planning.plan import Plan
from fxprune.runtime.json_text import first_few


def verify_graph(name: str, before: list[str], gm: fx.GraphModule, gone: set[str]) -> None:
    """Check that a rewritten graph is well-formed, has its old arguments, and contains no removed node.

    Parameters
    ----------
    name : str
        Path of the island, for the message.
    before : list of str
        Placeholder names of the graph before the rewrite.
    gm : GraphModule
        The graph after it.
    gone : set of str
        Names of the nodes that the plan removes.

    Raises
    ------
    PlanError
        If a check fails, because the plan does not describe regions of this graph.

    Examples
    --------
    >>> verify_graph("", ["x"], fx.symbolic_trace(lambda x: x + 1), {"mul"})
    """
    gm.graph.lint()
    left = sorted(gone & {node.name for node in gm.graph.nodes if node.op != "placeholder"})  # an input may be unread
    if left:
        raise PlanError(
            f"island {name or '<model>'!r}: {first_few(left)} should be gone but something still reads them"
        )
    after = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    if after != before:
        raise PlanError(f"island {name or '<model>'!r}: its arguments changed from {before} to {after}")


def verify_weights(original: nn.Module, pruned: nn.Module, plan: Plan, narrowed: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the remaining weights have the names of the original and the expected shapes.

    Parameters
    ----------
    original, pruned : Module
        The model before and after the rewrite.
    plan : Plan
        The applied plan, for the message.
    narrowed : mapping of str to tuple of int
        New shapes of the narrowed weights, by path.

    Raises
    ------
    PlanError
        If a key is new, or a tensor does not have its expected shape.

    Examples
    --------
    >>> verify_weights(model, pruned, plan, {})                    # doctest: +SKIP
    """
    shapes = {key: tuple(value.shape) for key, value in original.state_dict().items() if hasattr(value, "shape")}
    expected = shapes | {key: shape for key, shape in narrowed.items() if key in shapes}
    for key, value in pruned.state_dict().items():
        if isinstance(value, torch.Tensor) and expected.get(key) != tuple(value.shape):
            raise PlanError(f"the plan for {len(plan.removed)} regions changed weight {key!r}; report this as a bug")
