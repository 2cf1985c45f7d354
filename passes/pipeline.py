"""All that is done to a graph once its regions are bypassed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.passes.concat import join_parts, narrow_readers
from fxprune.passes.dead_code import remove_dead_code
from fxprune.passes.identity_ops import skip_idle
from fxprune.passes.in_place import overwrite_again


def clean_up(gm: fx.GraphModule, channels: Mapping[str, int], model: nn.Module) -> PassResult:
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
        skip_idle(gm),
        narrow_readers(gm, channels, model),
        join_parts(gm),
        remove_dead_code(gm),
        overwrite_again(gm),
    )
    return PassResult(gm, any(result.modified for result in results))
