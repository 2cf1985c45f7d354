"""Runs all passes that simplify a graph after its regions were bypassed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.passes.concat import collapse_split_concat, deduplicate_concat
from fxprune.passes.dead_code import remove_dead_code
from fxprune.passes.identity_ops import remove_identity_ops


def simplify(
    gm: fx.GraphModule, channels: Mapping[str, int], model: nn.Module, contiguous: Collection[str] = ()
) -> PassResult:
    """Replaces a graph by an equivalent graph with fewer operations and parameters.

    Parameters
    ----------
    gm : GraphModule
        Functional; rewritten in place.
    channels : mapping of str to int
        Number of channels of the values, by node name; see `fxprune.capture.channels.channels_of`.
    model : Module
        The model that contains the graph. Weights shared with other parts of it stay.
    contiguous : collection of str
        Names of values that are contiguous for reasons outside this graph, such as inputs.

    Returns
    -------
    PassResult
        `modified` is True if any pass changed the graph.

    Examples
    --------
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Conv2d(3, 8, 1)))
    >>> simplify(gm, {}, gm).modified
    True
    """
    results = (
        remove_dead_code(gm),
        remove_identity_ops(gm),
        deduplicate_concat(gm, channels, model),
        collapse_split_concat(gm, contiguous),
        remove_dead_code(gm),
    )
    return PassResult(gm, any(result.modified for result in results))
