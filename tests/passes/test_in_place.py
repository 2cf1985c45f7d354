"""In-place layers of a pruned model overwrite only values that nothing else reads."""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision import models

import fxprune
from fxprune import Plan
from fxprune.graph.interpreters import Graphs, run_with
from fxprune.profiling.latency import harmless_inplace_flags
from fxprune.profiling.node_timer import NodeTimer
from tests.helpers.captures import capture_copy
from tests.helpers.models import Block, build, finite, labelled, pixels


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.inplace for name, module in model.named_modules() if hasattr(module, "inplace")}


def functional(model: nn.Module) -> nn.Module:
    """A twin whose layers overwrite nothing."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return twin


def conv(first: int = 8, second: int = 8) -> nn.Conv2d:
    return nn.Conv2d(first, second, 3, padding=1)


class Joined(nn.Module):
    """With `branch` dropped, `act` reads what is read again after it; `late` reads its own norm whatever goes."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.stem, self.norm = conv(3), nn.BatchNorm2d(8)
        self.branch = nn.Sequential(conv(3, 4), conv(4))
        self.act = nn.ReLU(inplace=True)
        self.last, self.last_norm = conv(), nn.BatchNorm2d(8)
        self.late = self.act if shared else nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(y := self.norm(self.stem(x)), y + self.branch(x))

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        return self.fc(self.late(self.last_norm(self.last(self.act(z) - y))).mean((2, 3)))


@pytest.mark.parametrize("shared", [False, True])
def test_in_place_layers_do_not_overwrite_values_read_by_others(shared: bool) -> None:
    model = build(Joined, shared=shared)
    analysis = fxprune.analyze(model, labelled(), criterion=lambda region, _: float(region.name != "branch"))
    plan = analysis.plan(0.2)
    assert [(region.name, region.kind) for region in plan.removed] == [("branch", "drop")]
    pruned, expected = fxprune.apply(model, plan), functional(model)
    assert isinstance(expected, Joined)
    y = expected.norm(expected.stem(x := pixels(2, 3, 16, 16, seed=3)))
    assert torch.equal(pruned(x), expected.finish(y, y))
    assert flags(pruned) == ({"act": False} if shared else {"act": False, "late": True})
    assert all(flags(model).values())


CALLS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "torch.relu_": (torch.relu_, ["relu", "relu_"]),
    "torch.sigmoid_": (torch.sigmoid_, ["sigmoid", "sigmoid_"]),
    "functional.elu_": (nn.functional.elu_, ["elu", "elu_"]),
    "functional.hardtanh_": (nn.functional.hardtanh_, ["hardtanh", "hardtanh_"]),
    "torch.clamp_": (lambda x: torch.clamp_(x, 0, max=1), ["clamp", "clamp_"]),
    "torch.zero_": (torch.zero_, ["zeros_like", "zero_"]),
    "input=": (lambda x: torch.relu_(input=x), ["relu", "relu"]),
    "relu_()": (lambda x: x.relu_(), ["relu", "relu"]),
    "add_()": (lambda x: x.add_(1), ["add", "add"]),
    "inplace=True": (lambda x: nn.functional.silu(x, inplace=True), ["silu", "silu"]),
}
"""Calls that overwrite, and what a pruned model calls where others read the value and where none does."""


class Calling(nn.Module):
    """With `branch` dropped, the first call is of a value that is read again after it."""

    def __init__(self, call: Callable[..., Tensor], as_statement: bool) -> None:
        super().__init__()
        self.stem, self.norm = conv(3), nn.BatchNorm2d(8)
        self.branch = nn.Sequential(conv(3, 4), conv(4))
        self.last, self.last_norm, self.fc = conv(), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.call, self.as_statement = call, as_statement

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(y := self.norm(self.stem(x)), y + self.branch(x))

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        z = self.last_norm(self.last(self.overwrite(z)))
        return self.fc((self.overwrite(z) - y * y).mean((2, 3)))

    def overwrite(self, value: Tensor) -> Tensor:
        result = self.call(value)
        return value if self.as_statement else result


@pytest.mark.parametrize("as_statement", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_in_place_functions_do_not_overwrite_values_read_by_others(name: str, as_statement: bool) -> None:
    call, expected = CALLS[name]
    model = build(Calling, call=call, as_statement=as_statement)
    analysis = fxprune.analyze(model, labelled(), criterion=lambda region, _: float(region.name != "branch"))
    plan = analysis.plan(0.2)
    assert [(region.name, region.kind) for region in plan.removed] == [("branch", "drop")]
    pruned = fxprune.apply(model, plan)
    assert isinstance(model, Calling)
    assert isinstance(pruned, fx.GraphModule)  # the removed convolution stands between functions
    y = model.norm(model.stem(x := pixels(2, 3, 16, 16, seed=3)))
    assert torch.equal(pruned(x), model.finish(y, y.clone()))
    calls = [node for node in pruned.graph.nodes if node.op in ("call_function", "call_method")]
    names = [getattr(node.target, "__name__", node.target) for node in calls]
    assert names == [*expected, "mul", "sub", "mean"]


def test_layers_that_were_not_in_place_stay_so(tiny_model: nn.Module, plan: Plan) -> None:
    assert all(flags(fxprune.apply(tiny_model, plan)).values())
    assert not any(flags(fxprune.apply(functional(tiny_model), plan)).values())


def test_gradients_equal_those_of_a_model_without_in_place_layers(tiny_model: nn.Module, plan: Plan) -> None:
    pruned = fxprune.apply(tiny_model, plan).train()
    assert any(flags(pruned).values())
    twin = functional(pruned)
    for model in (pruned, twin):
        model(pixels(4, 3, 16, 16, seed=3)).square().sum().backward()
    for (name, first), second in zip(pruned.named_parameters(), twin.parameters(), strict=True):
        assert first.grad is not None, name
        assert torch.equal(first.grad, second.grad), name  # type: ignore[arg-type]


def test_input_image_is_not_overwritten() -> None:
    model = build(lambda: nn.Sequential(nn.ReLU(inplace=True), conv(3), *(nn.Sequential(conv()) for _ in range(3))))
    images = [pixels(2, 3, 16, 16) - 0.5]
    pruned = fxprune.compile(model, images, 0.2, criterion="l1", loss=lambda net, x: net(x).square().mean())
    image = images[0].clone()
    pruned(image)
    assert torch.equal(image, images[0])


class Adding(nn.Module):
    """Overwrites a norm's value by a sum, which the activation overwrites in turn; `kept` is read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = conv(3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.body, self.body_norm = conv(), nn.BatchNorm2d(8)
        self.spare = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.norm(self.stem(x))
        x = self.body_norm(self.body(kept))
        x += kept
        x = self.spare(self.act(x))
        kept = kept * 2
        kept += x
        return self.fc(kept.mean((2, 3)))


class AddingInside(Adding):
    """The removed convolution ends with an activation that the forward itself calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = conv()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        kept = self.norm(self.stem(x))
        x = self.body_norm(self.body(kept))
        x += kept
        x = torch.sigmoid(self.spare(self.act(x)))
        kept = kept * 2
        kept += x
        return self.fc(kept.mean((2, 3)))


def test_sums_become_in_place_where_nothing_else_reads() -> None:
    model = build(AddingInside)
    analysis = fxprune.analyze(model, labelled(), criterion=lambda region, _: float(region.name != "spare"))
    plan = analysis.plan(0.2)
    assert [region.name for region in plan.removed] == ["spare"]
    pruned = fxprune.apply(model, plan)
    expected = build(Adding)
    expected.set_submodule("spare", nn.Identity())
    expected.load_state_dict({key: value for key, value in model.state_dict().items() if "spare" not in key})
    x = pixels(2, 3, 16, 16, seed=3)
    assert torch.equal(pruned(x), expected(x))
    assert isinstance(pruned, fx.GraphModule)  # the removed activation is a function: the forward changed
    assert [node.target for node in pruned.graph.nodes if node.name.startswith("add")] == [operator.iadd, operator.add]
    assert flags(pruned)["act"]
    again = fxprune.compile(pruned, labelled(), 0.1, criterion="l1")
    assert again(x).shape == (2, 5)


@pytest.mark.filterwarnings("ignore:.*looks untrained:fxprune.FxpruneWarning")
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_most_activations_stay_in_place(name: str) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    plan = fxprune.analyze(model, [pixels(2, 3, 64, 64)], criterion="l1").plan(0.2)
    pruned = fxprune.apply(model, plan)
    kept = list(flags(pruned).values())
    assert sum(kept) > 0.7 * len(kept)
    x = pixels(2, 3, 64, 64, seed=1)
    assert torch.equal(pruned(x), functional(pruned)(x))


# While milliseconds are measured --------------------------------------------------------------------------------------


class Sharing(Adding):
    """`late` reads what is read again after it, `plain` overwrites nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.plain = nn.ReLU(inplace=True), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.norm(self.stem(x))
        x = self.body_norm(self.body(kept))
        x += kept
        return self.fc((self.late(kept) - self.plain(self.act(x)) + kept).mean((2, 3)))


def test_captured_layers_keep_harmless_in_place_flags() -> None:
    model = build(Sharing)
    whole, islands = capture_copy(model, x := pixels(2, 3, 16, 16), whole_model_is_graph=True)
    expected, graphs = model(x), Graphs.of(whole, islands)
    before = flags(whole)
    assert before == flags(model)
    assert before["act"]
    assert before["late"]
    with harmless_inplace_flags(graphs), torch.no_grad():
        assert flags(whole) == {**before, "late": False}
        with run_with(graphs, lambda island, gm: fx.Interpreter(gm), in_place=True):
            assert torch.equal(whole(x), expected)
    assert flags(whole) == before


def test_captured_functions_match_in_place_calls_under_a_timer() -> None:
    model, islands = capture_copy(build(Sharing), x := pixels(2, 3, 16, 16), whole_model_is_graph=True)
    values: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, layer: nn.Module, args: object, value: Tensor) -> None:
        values[name] = value, value.clone()

    for name in ("norm", "body_norm", "fc"):
        model.get_submodule(name).register_forward_hook(partial(note, name))
    graphs = Graphs.of(model, islands)
    timer = NodeTimer(graphs, None, time.perf_counter)
    with torch.no_grad():
        with run_with(graphs, lambda island, gm: fx.Interpreter(gm)):
            expected = model(x)
        assert all(torch.equal(*pair) for pair in values.values())
        timer.run(lambda: model(x))
    assert torch.equal(values["fc"][0], expected)
    assert {name: torch.equal(*pair) for name, pair in values.items()} == {"norm": True, "body_norm": False, "fc": True}


class Overwrites(nn.Module):
    """Stays eager, and may overwrite what a captured part gave."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8))
        self.act = nn.LeakyReLU(0.5, inplace)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(finite(x)))).mean((2, 3))


@pytest.mark.parametrize("criterion", ["fisher", "grad_act"])
def test_scores_use_values_before_they_are_overwritten(criterion: str) -> None:
    found = [
        fxprune.analyze(build(Overwrites, inplace=inplace), labelled(), criterion=criterion)
        for inplace in (False, True)
    ]
    first, second = ([(region.name, region.score) for region in analysis.regions] for analysis in found)
    assert len(first) == 2
    assert first == second
