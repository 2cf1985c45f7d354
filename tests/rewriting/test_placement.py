"""Regions are removed at the smallest place, and the result computes what the whole rewritten graph computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune import Plan
from fxprune.errors import BudgetError, NoRegionError
from fxprune.rewriting.apply import trace_checked
from fxprune.rewriting.pruned_module import PassThrough, PrunedModule
from fxprune.rewriting.whole_graph import IslandRewriter
from tests.helpers.models import pixels
from tests.helpers.module_trees import Tree, random_tree

IMAGES = pixels(2, 3, 7, 6, seed=4)


def squared(model: Any, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return out.square().mean()


def whole_rewrite(model: nn.Module, plan: Plan) -> nn.Module:
    """The oracle: every island of the plan as one graph without the removed regions; nothing is overwritten."""
    shell = nn.Module()
    shell.root = copy.deepcopy(model)
    for record in plan.islands:
        path = ".".join(filter(None, ("root", record.name)))
        gm = trace_checked(shell.root, record, plan)
        removed = [row.region for row in plan.removed if row.island == record.name]
        shell.set_submodule(path, IslandRewriter(record.name, gm, record.opaque, shell).rewrite(removed).gm)
    for part in shell.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    return shell.root


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    squared(model, x).backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_same_program(pruned: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and statistics agree bit for bit, in eval and in train mode."""
    for training in (False, True):
        first, second = copy.deepcopy(pruned).train(training), copy.deepcopy(expected).train(training)
        assert torch.equal(first(x), second(x))
        one, other = gradients(first, x), gradients(second, x)
        assert set(other) <= set(one)
        assert all(torch.equal(one[name], other[name]) for name in other)
        buffers = dict(first.named_buffers())
        assert all(torch.equal(buffers[name], value) for name, value in second.named_buffers())


def plan_of(model: nn.Module, seed: int, budget: float) -> Plan:
    analysis = fxprune.analyze(model, [IMAGES], loss=squared, criterion="random", seed=seed)
    return analysis.plan(budget)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), eager=st.booleans(), budget=st.sampled_from([0.05, 0.2, 0.4]))
def test_random_module_trees_compute_what_the_whole_graph_computes(seed: int, eager: bool, budget: float) -> None:
    model = random_tree(seed, eager)
    try:
        gradients(copy.deepcopy(model).train(), IMAGES)
    except RuntimeError:  # an in-place layer of the tree overwrites what the backward pass needs
        assume(False)
    try:
        plan = plan_of(model, seed, budget)
    except (BudgetError, NoRegionError):
        assume(False)
    assume(plan.removed)
    pruned: Any = fxprune.apply(model, plan)
    assert_same_program(pruned, whole_rewrite(model, plan), IMAGES)
    assert_same_program(pickle.loads(pickle.dumps(pruned)), pruned, IMAGES)
    changed = {path for path, part in pruned.named_modules() if isinstance(part, PrunedModule)}
    for path, part in pruned.named_modules():
        kept = type(part) is type(model.get_submodule(path))
        assert kept or path in changed or isinstance(part, (nn.Identity, PassThrough))
    assert (pruned.stride, pruned.decode(pruned(IMAGES)).shape) == (1, (2,))
    if "" not in changed:
        assert type(pruned) is Tree
        pruned.export = True
        torch.testing.assert_close(pruned(IMAGES).sum(1), torch.ones(2))
