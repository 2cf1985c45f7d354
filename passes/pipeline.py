"""All that is done to a graph once its regions are bypassed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.passes.concat import collapse_split_concat, deduplicate_concat
from fxprune.passes.dead_code import remove_dead_code
from fxprune.passes.identity_ops import remove_identity_ops
from fxprune.passes.in_place import reinplace


def run_pipeline(gm: fx.GraphModule, channels: Mapping[str, int], model: nn.Module) -> PassResult:
    """Replaces a graph by one that computes the same with less.

    Parameters
    ----------
    gm : GraphModule
        Rewritten in place.
    channels : mapping of str to int
        How many channels its values have.
    model : Module
        What it is a part of.

    Returns
    -------
    PassResult
        `modified` says whether anything changed.
    """
    results = (
        remove_dead_code(gm),
        remove_identity_ops(gm),
        deduplicate_concat(gm, channels, model),
        collapse_split_concat(gm),
        remove_dead_code(gm),
        reinplace(gm),
    )
    return PassResult(gm, any(result.modified for result in results))
