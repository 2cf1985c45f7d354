"""Interpreters run graphs in place of modules for a while, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.capture.islands import capture_islands
from fxprune.graph.interpreters import Graphs, run_with
from fxprune.graph.operators import in_place_layers
from tests.helpers.models import Block, build, finite, pixels

X = pixels(2, 3, 16, 16)


def graphs_of(model: nn.Module) -> Graphs:
    islands, _ = capture_islands(model, [lambda network: network(X)], True)
    return Graphs.of(model, islands)


class Spy(fx.Interpreter):
    """Notes each of its runs, and the in-place flags of the layers that the graph calls, during the run."""

    def __init__(self, island: str, gm: fx.GraphModule, ran: list[str]) -> None:
        super().__init__(gm)
        self.island, self.ran, self.flags = island, ran, set[bool]()
        self.layers = list(in_place_layers(gm))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.ran.append(self.island)
        self.flags |= {bool(layer.inplace) for _, layer, _ in self.layers}
        return super().run(*args, **kwargs)


class Nested(nn.Module):
    """Traceable around a part that is not, which holds a traceable block and calls it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part, self.last = nn.Conv2d(3, 8, 3, padding=1), Looking(), Block(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self.stem(x))).mean((2, 3))


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(finite(x))


@pytest.mark.parametrize("in_place", [False, True])
def test_graphs_run_in_the_block_and_modules_after_it(in_place: bool) -> None:
    model, ran = build(Nested), list[str]()
    graphs, expected = graphs_of(model), model(X)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    spies = {name: Spy(name, gm, ran) for name, gm in graphs}
    with run_with(graphs, lambda name, gm: spies[name], in_place):
        assert torch.equal(model(X), expected)
    assert ran == ["", "part.block"]
    assert all(spy.flags == {in_place} for spy in spies.values())
    assert torch.equal(model(X), expected)
    assert ran == ["", "part.block"]
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_model_is_restored_after_an_error() -> None:
    model = build(Nested)
    graphs = graphs_of(model)
    with pytest.raises(RuntimeError, match="channels"), run_with(graphs, lambda name, gm: fx.Interpreter(gm)):
        model(pixels(1, 4, 8, 8))
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))


def test_flags_are_those_of_the_model_where_python_calls_the_layer() -> None:
    """The shared activation belongs to a graph, and Python code around relies on what it overwrites."""

    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.LeakyReLU(0.5, inplace=True)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), self.act, nn.Conv2d(8, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            kept = self.body(finite(x))
            self.act(kept)
            return kept.mean((2, 3))

    model = build(Sharing)
    graphs, expected = graphs_of(model), model(X)
    assert [name for name, _ in graphs] == ["body"]
    with run_with(graphs, lambda name, gm: fx.Interpreter(gm)), torch.no_grad():
        assert torch.equal(model(X), expected)


def test_module_with_two_paths_runs_its_graph_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first = nn.Conv2d(3, 8, 3), Block(8)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.stem(finite(x))))

    model, ran = build(Twice), list[str]()
    graphs = graphs_of(model)
    with run_with(graphs, lambda name, gm: Spy(name, gm, ran)):
        model(X)
    assert ran == ["stem", "first", "first"]


def test_hooks_and_methods_of_an_island_stay_usable() -> None:
    class Head(nn.Module):
        classes = 5

        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = Block(8), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.block(x))

        def decode(self, y: Tensor) -> Tensor:
            return y.mean((2, 3))[:, : self.classes]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), Head()

        def forward(self, x: Tensor) -> Tensor:
            return self.head.decode(self.head(self.stem(finite(x))))

    model, seen = build(Model), list[torch.Size]()
    model.get_submodule("head").register_forward_hook(lambda module, args, output: seen.append(output.shape))
    graphs, expected = graphs_of(model), model(X)
    seen.clear()
    with run_with(graphs, lambda name, gm: fx.Interpreter(gm)):
        assert torch.equal(model(X), expected)
    assert seen == [torch.Size((2, 5, 14, 14))]


def test_code_around_a_graph_gets_lists_that_it_can_change() -> None:
    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"levels": [self.a(x), self.b(x)]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = Neck()

        def forward(self, x: Tensor) -> Tensor:
            found = self.neck(finite(x))
            found["levels"][0] = found["levels"][0] * 2
            found["sum"] = sum(found["levels"])
            return found["sum"]

    model = build(Model)
    graphs, expected = graphs_of(model), model(X)
    assert [name for name, _ in graphs] == ["neck"]
    with run_with(graphs, lambda name, gm: fx.Interpreter(gm)):
        assert torch.equal(model(X), expected)


@pytest.mark.usefixtures("forget_compiled_code")
def test_compiled_parts_run_eagerly_while_graphs_run() -> None:
    compiled: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    model = build(Looking)
    expected = model(pixels(2, 8, 6, 6))
    model.set_submodule("block", torch.compile(model.get_submodule("block"), backend=backend))  # type: ignore[arg-type]
    islands, _ = capture_islands(model, [lambda network: network(pixels(2, 8, 6, 6))], True)
    with run_with(Graphs.of(model, islands), lambda name, gm: fx.Interpreter(gm)):
        assert torch.equal(model(pixels(2, 8, 6, 6)), expected)
    assert compiled == []
    model(pixels(2, 8, 6, 6))
    assert len(compiled) == 1
