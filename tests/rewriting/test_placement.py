"""Regions are removed at the smallest place, and the result computes what the whole rewritten graph computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune import Plan
from fxprune.errors import BudgetError, NoRegionError
from fxprune.graph.fx_utils import is_within
from fxprune.rewriting.pruned_module import PassThrough, PrunedModule
from tests.helpers.models import pixels
from tests.helpers.module_trees import Tree, random_tree
from tests.helpers.whole_rewrites import rewrite_whole

IMAGES = pixels(2, 3, 7, 6, seed=4)


def squared(model: Any, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return out.square().mean()


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
    assert_same_program(pruned, rewrite_whole(model, plan), IMAGES)
    assert_same_program(pickle.loads(pickle.dumps(pruned)), pruned, IMAGES)
    changed = {path for path, part in pruned.named_modules() if isinstance(part, PrunedModule)}
    for path, part in pruned.named_modules():
        kept = type(part) is type(model.get_submodule(path))
        holds_parts = type(part) is nn.Module and is_within(path, changed)
        assert kept or path in changed or isinstance(part, (nn.Identity, PassThrough)) or holds_parts
    assert (pruned.stride, pruned.decode(pruned(IMAGES)).shape) == (1, (2,))
    if "" not in changed:
        assert type(pruned) is Tree
        pruned.export = True
        torch.testing.assert_close(pruned(IMAGES).sum(1), torch.ones(2))


# Kinds of places -----------------------------------------------------------------------------------------------------


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Shell(nn.Module):
    """A stem, the part under test, a head."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Conv2d(3, 4, 3, padding=1), part, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.stem(x)))


def plan_without(model: nn.Module, *names: str) -> Plan:
    analysis = fxprune.analyze(
        model, [IMAGES], loss=squared, criterion=lambda region, _: float(region.name not in names)
    )
    share = sum(region.flops for region in analysis.regions if region.name in names) / analysis.before.flops
    plan = analysis.plan(share * 0.999)
    assert {region.name for region in plan.removed} == set(names), [region.name for region in analysis.regions]
    return plan


def pruned_without(model: nn.Module, *names: str) -> Any:
    """Remove just these regions, and compare with the whole rewritten graph."""
    plan = plan_without(model.eval(), *names)
    pruned = fxprune.apply(model, plan)
    assert_same_program(pruned, rewrite_whole(model, plan), IMAGES)
    return pruned


def changed_classes(pruned: nn.Module, model: nn.Module) -> dict[str, str]:
    before = dict(model.named_modules(remove_duplicate=False))
    return {path: type(part).__name__ for path, part in pruned.named_modules() if type(part) is not type(before[path])}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def test_a_block_becomes_an_identity_and_nothing_else_changes() -> None:
    model = Shell(nn.Sequential(Block(), Block()))
    pruned = pruned_without(model, "part.0")
    assert changed_classes(pruned, model) == {"part.0": "Identity"}
    assert pruned.part[-1].first.weight.shape == (4, 4, 3, 3)


def test_a_row_of_layers_becomes_identities() -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act, self.after = conv(), nn.BatchNorm2d(4), nn.ReLU(), conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.act(self.norm(self.conv(torch.sigmoid(x)))))

    model = Shell(Row())
    pruned = pruned_without(model, "part.conv")
    assert set(changed_classes(pruned, model).values()) == {"Identity"}


class Decoder(nn.Module):
    """A layer that takes two values and a mask, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = conv(), conv()

    def forward(self, x: Tensor, memory: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        x = x + self.own(x) * scale
        return x + self.cross(memory) * x, None


class Decoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Decoder() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        value = x * 2
        for layer in self.layers:
            value = layer(value, memory=x, scale=0.5)[0]
        return value


class Encoder(nn.Module):
    """A layer with an optional argument that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Block()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.own(x), None


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Encoder() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask=None)[0]
        return x


def test_a_layer_with_several_arguments_is_passed_through() -> None:
    model = Shell(Encoders())
    (name,) = {row.name for row in fxprune.analyze(model.eval(), [IMAGES], loss=squared).regions} & {
        "part.layers.1", "part.layers.1.own"
    }  # fmt: skip
    pruned = pruned_without(model, name)
    assert changed_classes(pruned, model) == {"part.layers.1": "PassThrough"}
    assert repr(pruned.part.layers[1]) == "PassThrough(returns='x', in a tuple)"
    again = pickle.loads(pickle.dumps(copy.deepcopy(pruned)))
    assert torch.equal(again(IMAGES), pruned(IMAGES))


def test_a_branch_changes_the_class_of_its_module_only() -> None:
    model = Shell(Decoders())
    pruned = pruned_without(model, "part.layers.1.own")
    assert changed_classes(pruned, model) == {"part.layers.1": "Decoder"}
    assert isinstance(pruned.part.layers[1], PrunedModule)
    assert pruned.part.layers[1].original_class is Decoder


def test_arguments_that_were_constants_are_checked() -> None:
    pruned = pruned_without(Shell(Decoders()), "part.layers.1.cross")
    values = torch.zeros(1, 4, 3, 3)
    with pytest.raises(TypeError, match=r"traced with scale=0\.5 and got 1\.0"):
        pruned.part.layers[1](values, memory=values)


def test_a_block_that_is_called_twice_goes_if_both_calls_go() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(torch.exp(self.block(torch.exp(x))))

    model = Shell(Twice())
    assert changed_classes(pruned_without(model, "part", "part#2"), model) == {"part.block": "Identity"}
    assert changed_classes(pruned_without(model, "part"), model) == {"part": "Twice"}


def test_layers_that_would_overwrite_a_kept_value_no_longer_do() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.act, self.after = conv(), conv(), nn.ReLU(inplace=True), conv()

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.left(torch.tanh(x)), self.right(x)
            return self.after(self.act(left + right)) + right

    model = Shell(Keeping())
    pruned = pruned_without(model, "part.left")
    assert not any(getattr(part, "inplace", False) for part in pruned.modules())
    assert model.part.act.inplace  # type: ignore[union-attr]


def test_hooks_flags_and_methods_around_a_cut_stay() -> None:
    model = Shell(nn.Sequential(Block(), Block()))
    calls: list[str] = []
    model.part.register_forward_hook(lambda *_: calls.append("part"))
    model.part.get_submodule("1").register_forward_hook(lambda *_: calls.append("block"))
    pruned = pruned_without(model, "part.0")
    calls.clear()
    pruned(IMAGES)
    assert calls == ["block", "part"]
