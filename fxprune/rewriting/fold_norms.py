"""Folds the batch norms of a model into the convolutions before them, for inference."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

from fxprune.adapters.registry import rewrap_like, unwrap
from fxprune.capture.channels import trace_leaf
from fxprune.capture.tracer import FunctionalTracer
from fxprune.errors import ModelError
from fxprune.graph.fx_utils import graph_structure
from fxprune.passes.fold_batchnorm import fold_batchnorm, foldable_pairs, folded_convolution
from fxprune.rewriting.history import traced_islands
from fxprune.rewriting.pruned_module import PrunedModule, called_layers
from fxprune.runtime.private_copy import private_copy

FUSED_FORWARD = "forward_fuse"
"""Name of the method by which a leaf module runs without its norm."""


def fold_norms(model: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them, in a copy of the model for inference.

    Works on a pruned model, on any `torch.fx.GraphModule`, and on modules with their own fused forward (ultralytics'
    ``Conv``). In a pruned model it folds the norms of all parts that were analyzed as graphs. A norm stays if its
    convolution is called twice or has other readers, or if the norm or the convolution is used in two places.

    Parameters
    ----------
    model : Module
        Result of `fxprune.compile`, `fxprune.apply` or `torch.fx.symbolic_trace`. It is not changed.

    Returns
    -------
    Module
        The same kind of model, in eval mode. A folded norm is an `Identity`. The outputs are equal except for rounding.
        Training no longer updates any statistics. Save the model before folding: `fxprune.save` refuses a folded model.

    Raises
    ------
    ModelError
        If the model was not pruned and has no graph in which norms can be folded.

    Examples
    --------
    >>> served = fxprune.fold_norms(pruned)                        # doctest: +SKIP
    """
    network = unwrap(model)
    twin = private_copy(network, keep_precision=True).eval()
    graphs = [module for module in twin.modules() if isinstance(module, fx.GraphModule)]
    islands = list(traced_islands(twin))
    folded = [_fold_leaf(module) for module in list(twin.modules())]
    if not graphs and not islands and not any(folded):
        raise ModelError(
            f"{type(network).__name__} was not pruned and holds no graph to fold norms in; give a pruned model, or"
            " torch.fx.symbolic_trace of one"
        )
    for gm in graphs:
        if not isinstance(gm, PrunedModule):
            fold_batchnorm(gm)
    for name, gm in islands:
        _fold_part(twin, name, gm)
    return rewrap_like(model, twin)


def _fold_part(model: nn.Module, name: str, gm: fx.GraphModule) -> None:
    """Fold the norms of one part of a model: convolutions are replaced, and norms become identities."""
    part = model.get_submodule(name)
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    uses += Counter(id(gm.get_submodule(path)) for path in called_layers(gm))
    for nodes in foldable_pairs(gm):
        convolution, norm = (gm.get_submodule(str(node.target)) for node in nodes)
        if uses[id(convolution)] == uses[id(norm)] == 2:  # one path and one call each
            part.set_submodule(str(nodes[0].target), folded_convolution(convolution, norm))
            part.set_submodule(str(nodes[1].target), nn.Identity().eval())


def _fold_leaf(layer: nn.Module) -> bool:
    """Fold the single norm of a leaf module that can run without it. Returns whether a norm was folded."""
    inside = trace_leaf(layer) if hasattr(layer, FUSED_FORWARD) else None
    pairs = [] if inside is None else list(foldable_pairs(inside))
    if inside is None or len(pairs) != 1:
        return False
    ((convolution, norm),) = ((str(node.target) for node in pair) for pair in pairs)
    both = folded_convolution(inside.get_submodule(convolution), inside.get_submodule(norm))
    fold_batchnorm(inside)
    tracer = FunctionalTracer()
    tracer.traced_func_name = FUSED_FORWARD
    if graph_structure(tracer.trace(layer)) != graph_structure(inside.graph):
        return False
    layer.set_submodule(convolution, both)
    owner, _, name = norm.rpartition(".")
    delattr(layer.get_submodule(owner), name)
    fused: Any = getattr(layer, FUSED_FORWARD)
    layer.forward = fused
    return True
