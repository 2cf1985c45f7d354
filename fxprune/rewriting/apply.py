"""Defines `apply`, which removes the regions of a plan from a copy of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torchvision
from torch import fx, nn

from fxprune.adapters.registry import mark_pruned, rewrap_like, unwrap
from fxprune.capture.module_trace import Traced, Untraced, trace_module
from fxprune.errors import PlanError, warn_user
from fxprune.graph.fx_utils import fingerprint, is_within, join_path
from fxprune.planning.plan import IslandRecord, Plan
from fxprune.rewriting.history import (
    attach_history,
    narrowing_savings,
    override_save_pretrained,
    raw_plans,
    structural_changes,
)
from fxprune.rewriting.placement import remove_regions
from fxprune.rewriting.pruned_module import PrunedModule, called_layers
from fxprune.rewriting.verification import verify_weights
from fxprune.rewriting.whole_graph import IslandRewriter, check_nodes
from fxprune.runtime.json_text import first_few
from fxprune.runtime.private_copy import private_copy
from fxprune.runtime.torch_internals import has_backward_hooks, has_forward_hooks


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """Apply a plan to a copy of a model.

    Parameters
    ----------
    model : Module
        The model of the analysis, or one with the same structure and other weights. It is not changed.
    plan : Plan
        Output of `Analysis.plan` or `Plan.load`.

    Returns
    -------
    Module
        The same kind of model with the same modes, device and dtype. A removed region that is a whole module becomes
        `torch.nn.Identity`, or a `PassThrough` if it takes several arguments. Otherwise the innermost module around
        it becomes a `PrunedModule`, whose forward is a graph. All other modules keep their class, code, hooks and
        attributes. If a convolution would read one tensor twice, it reads it once, with the sum of both weights.

    Raises
    ------
    PlanError
        If the plan was made for another structure. The message names the island that differs.

    Warns
    -----
    FxpruneWarning
        If a module with hooks is removed, or its forward becomes part of a graph, so that its hooks no longer run. The
        message names it.

    Examples
    --------
    >>> pruned = fxprune.apply(model, analysis.plan(0.1))          # doctest: +SKIP
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"expected a Plan, got {type(plan).__name__}; read a file with Plan.load(path)")
    unlisted = {region.island for region in plan.removed} - {island.name for island in plan.islands}
    if unlisted:
        raise PlanError(f"the plan removes regions of {sorted(unlisted)} but does not list these among its islands")
    network = unwrap(model)
    with torch.inference_mode(False):
        shell = nn.Module()
        shell.add_module("root", private_copy(network, keep_precision=True))
        graphs = [trace_checked(shell.get_submodule("root"), record, plan) for record in plan.islands]
        narrowed: dict[str, tuple[int, ...]] = {}
        for record, gm in zip(plan.islands, graphs, strict=True):
            narrowed |= _rewrite_island(shell, record, gm, plan)
        pruned = shell.get_submodule("root")
    verify_weights(network, pruned, plan, narrowed)
    saved = narrowing_savings({node.name: node.flops for node in plan.nodes}, network.state_dict(), narrowed)
    fresh = plan.settings.without("heal", "measured")
    plans = [*raw_plans(network), replace(plan, settings=fresh).to_dict()]
    attach_history(pruned, plans, structural_changes(network), saved)
    mark_pruned(pruned)
    override_save_pretrained(network, pruned)
    return rewrap_like(model, pruned)


def trace_checked(model: nn.Module, record: IslandRecord, plan: Plan) -> fx.GraphModule:
    """Trace one island of a plan in a model and check its fingerprint.

    Raises
    ------
    PlanError
        If the model does not have this submodule, or if its structure differs.
    """
    where = f"island {record.name or '<model>'!r}"
    try:
        module = model.get_submodule(record.name)
    except AttributeError:
        raise PlanError(f"the plan needs {where}, which this model does not have") from None
    traced = trace_module(module, frozenset(record.opaque), fixed_opaque=True, constants=record.constants)
    if isinstance(traced, Traced) and fingerprint(traced.gm) == record.fingerprint:
        return traced.gm
    found = f"has fingerprint {fingerprint(traced.gm)}" if isinstance(traced, Traced) else "is no graph"
    why = f" ({traced.reason})" if isinstance(traced, Untraced) and traced.reason else ""
    raise PlanError(
        f"{where} of this model {found}{why}, the plan was made for {record.fingerprint}:"
        f" the structure differs{_describe_version_changes(plan)}; analyze this model and make a new plan"
    )


def _describe_version_changes(plan: Plan) -> str:
    """Return the libraries whose version differs from that in the plan, in words: their models may differ too."""
    made = plan.settings.versions
    known = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    known = {name: version.partition("+")[0] for name, version in known.items()}
    then = {name: made[name].partition("+")[0] for name in known if name in made}
    others = [f"{name} {then[name]}, here is {known[name]}" for name in then if then[name] != known[name]]
    return f" (it was made with {' and '.join(others)})" if others else ""


def _rewrite_island(
    shell: nn.Module, record: IslandRecord, gm: fx.GraphModule, plan: Plan
) -> dict[str, tuple[int, ...]]:
    """Remove the plan's regions from one island. Return the new shapes of narrowed weights."""
    path = join_path("root", record.name)
    removed = [candidate.region for candidate in plan.removed if candidate.island == record.name]
    if not removed:
        return {}
    check_nodes(removed, gm)
    originals = dict(shell.get_submodule(path).named_modules())
    done = remove_regions(shell, path, IslandRewriter(record.name, gm, record.opaque, shell), removed)
    _warn_of_hooks(record.name, originals, shell.get_submodule(path))
    return {join_path(record.name, key): shape for key, shape in done.narrowed.items()}


def _warn_of_hooks(island: str, originals: Mapping[str, nn.Module], pruned: nn.Module) -> None:
    """Warn of hooks that no longer run: those of removed modules, and of modules whose forward moved to a graph."""
    kept = dict(pruned.named_modules())
    graphs = {path: part for path, part in kept.items() if isinstance(part, PrunedModule)}
    called = {join_path(path, target) for path, part in graphs.items() for target in called_layers(part)}
    lost = []
    for name, part in originals.items():
        inlined = name not in graphs and is_within(name, graphs) and not is_within(name, called)
        if _has_hooks(part) and (inlined or name not in kept or not _has_hooks(kept[name])):
            lost.append(join_path(island, name) or "the model itself")
    if lost:
        warn_user(
            f"hooks of {first_few(lost)} no longer run: these modules were removed, or a graph runs their operations."
            " Register hooks on the result, or on layers that stay"
        )


def _has_hooks(module: nn.Module) -> bool:
    return has_forward_hooks(module) or has_backward_hooks(module)
