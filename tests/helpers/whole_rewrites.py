"""Plans carried out on whole graphs: every island becomes one graph without its removed regions."""

from __future__ import annotations

import copy

from torch import nn

from fxprune.graph.fx_utils import join_path
from fxprune.graph.operators import in_place_layers
from fxprune.passes.in_place import reinplace
from fxprune.planning.plan import Plan
from fxprune.rewriting.apply import trace_checked
from fxprune.rewriting.whole_graph import IslandRewriter


def rewrite_whole(model: nn.Module, plan: Plan, in_place: bool = False) -> nn.Module:
    """Copy a model and replace each island of a plan by its rewritten graph.

    Unless `in_place`, no layer overwrites its input. Otherwise layers do where nothing else reads the value.
    """
    shell = nn.Module()
    shell.root = copy.deepcopy(model)
    graphs = [trace_checked(shell.root, record, plan) for record in plan.islands]
    for record, traced in zip(plan.islands, graphs, strict=True):
        removed = [row.region for row in plan.removed if row.island == record.name]
        gm = IslandRewriter(record.name, traced, record.opaque, shell).rewrite(removed).gm
        for _, layer, harmless in in_place_layers(gm):
            layer.inplace = bool(layer.inplace) and harmless and in_place  # type: ignore[assignment]
        if in_place:
            reinplace(gm)
        for name in ("f", "i", "type", "np"):  # ultralytics reads them of every layer
            if hasattr(module := shell.get_submodule(join_path("root", record.name)), name):
                setattr(gm, name, getattr(module, name))
        shell.set_submodule(join_path("root", record.name), gm)
    return shell.root
