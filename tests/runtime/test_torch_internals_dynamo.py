"""Dynamo behaves as `fxprune.runtime.torch_internals` relies on.

A failure here means that torch changed: adapt the entry that the test names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends import registry

from fxprune.runtime import torch_internals as internals
from tests.helpers.internals import changed

pytestmark = pytest.mark.usefixtures("forget_compiled_code")

graph_break: Any = torch._dynamo.graph_break

# Dynamo --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 3, 3, padding=1), 1

    def forward(self, image: Tensor) -> Tensor:
        y = self.conv(image).relu()
        if self.training:
            graph_break()
        return y + self.shift


class Watch:
    """A backend that notes what `look` returns for each graph, and each run of a graph."""

    def __init__(self, look: Callable[[fx.GraphModule], Any]) -> None:
        self.look, self.seen, self.runs = look, list[Any](), list[int]()

    def __call__(self, gm: fx.GraphModule, inputs: Any, **settings: Any) -> Callable[..., Any]:
        self.seen.append(self.look(gm))

        def run(*args: Any) -> Any:
            self.runs.append(internals.compiled_call_count())
            return gm(*args)

        return run


IMAGES = torch.rand(2, 3, 4, 4)


def call_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op.startswith("call_")]


def test_optimized_module() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, internals.OptimizedModule), changed("OptimizedModule", "torch.compile returns it")


def test_inner_compiler() -> None:
    settings: list[Any] = []

    def inner(gm: fx.GraphModule, inputs: Any, **given: Any) -> Any:
        settings.append(given)
        return gm

    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    for options, mode in (({}, None), ({"level": 3}, "reduce-overhead")):
        internals.inner_compiler(inner, options, mode)(gm, [IMAGES])
    assert settings == [{}, {"mode": "reduce-overhead", "options": {"level": 3}}]
    eager = internals.inner_compiler("eager", {}, None)(gm, [IMAGES])
    assert torch.equal(eager(IMAGES), IMAGES.relu()), changed("inner_compiler", "backends are found by name")


def test_inner_compiler_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(registry, "lookup_backend", lambda name: lambda gm, inputs, **given: seen.append(given))
    internals.inner_compiler("inductor", {"max_autotune": False}, "max-autotune")(None, None)
    ((name, patches),) = seen[0].items()
    assert name == "config_patches"
    assert patches["max_autotune"] is False
    assert patches["triton.cudagraphs"] is True, changed("inner_compiler", "list_mode_options has the mode's settings")
    monkeypatch.undo()
    model = nn.Sequential(nn.ReLU()).eval()
    compiled: Any = torch.compile(
        model,
        backend=lambda gm, inputs: internals.inner_compiler("inductor", {"max_autotune": False}, None)(gm, inputs),
    )
    with torch.no_grad():
        assert torch.equal(compiled(IMAGES), IMAGES.relu()), changed("inner_compiler", "inductor takes config_patches")


def test_calling_module() -> None:
    def look(gm: fx.GraphModule) -> Any:
        return internals.calling_module()

    watches = [Watch(look) for _ in range(3)]
    model, in_place = Net(), Net()
    in_place.compile(backend=watches[1])
    compiled: Any = torch.compile(model, backend=watches[0])
    function: Any = torch.compile(torch.neg, backend=watches[2])
    for call in (compiled, in_place, function):
        call(IMAGES)
    found = [[module is model, module is in_place, module is None] for watch in watches for module in watch.seen]
    wanted = [[True, False, False]] * 2 + [[False, True, False]] * 2 + [[False, False, True]]
    assert found == wanted, changed("calling_module", "the compiled module is `self` in a frame of the callers")
    assert internals.calling_module() is None


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_call_count(in_place: bool, fullgraph: bool) -> None:
    model: Any = Net().train(not fullgraph)
    watch = Watch(lambda gm: internals.compiled_call_count())
    compiled = model if in_place else torch.compile(model, backend=watch, fullgraph=fullgraph)
    if in_place:
        model.compile(backend=watch, fullgraph=fullgraph)
    for _ in range(3):
        compiled(IMAGES)
        if not in_place:
            model(IMAGES)
    counts = Counter(watch.runs)
    graphs = 1 if fullgraph else 2
    same = set(watch.seen) == {watch.runs[0]} and list(counts.values()) == [graphs] * 3
    assert same, changed("compiled_call_count", "it is the same in one call, and another in the next")


def test_compiled_frame() -> None:
    assert internals.compiled_frame() is None
    watch = Watch(lambda gm: internals.compiled_frame())
    model, other, container = Net(), Net().eval(), nn.Sequential(Net().eval())
    compiled: Any = torch.compile(model, backend=watch)
    compiled(IMAGES)
    torch.compile(lambda net: net(IMAGES), backend=watch)(other)
    container.compile(backend=watch)
    container(IMAGES)
    first, resumed, function, wrapped = watch.seen
    assert isinstance(first, internals.CompiledFrame)
    assert first.module is model, changed("compiled_frame", "the frame of forward has the module")
    assert first.variables["image"] is IMAGES, changed("compiled_frame", "the frame has its arguments")
    assert resumed.module is model, changed("compiled_frame", "so has the frame after a graph break")
    assert function.module is None, changed("compiled_frame", "a function is no module's")
    assert function.variables["net"] is other, changed("compiled_frame", "the frame has its arguments")
    behaviour = "it is the container, or since torch 2.11 does not compile its forward, its child"
    assert wrapped.module in (container, container[0]), changed("compiled_frame", behaviour)


def test_guard_identity() -> None:
    models = [Net().eval(), Net().eval()]
    for names, graphs in (((), 1), (("net",), 2), (("nothing",), 1)):
        torch._dynamo.reset()
        watch = Watch(lambda gm, names=names: internals.guard_identity(names))  # type: ignore[misc]
        compiled = torch.compile(lambda net, x: net(x), backend=watch)
        for model in (*models, *models):
            compiled(model, IMAGES)
        behaviour = "Dynamo compiles anew for another object, and only then"
        assert len(watch.seen) == graphs, changed("guard_identity", behaviour)


def test_module_calls() -> None:
    watch = Watch(lambda gm: {str(node.target): internals.module_calls(node) for node in call_nodes(gm)})
    net = Net().eval()
    torch.compile(lambda model, x: model(x), backend=watch)(net, IMAGES)
    (calls,) = ([call for name, call in watch.seen[0].items() if "conv" in name],)
    outer, inner = calls[0]
    assert isinstance(outer, internals.ModuleCall)
    assert (outer.module_id, inner.module_id) == (id(net), id(net.conv)), changed("module_calls", "keys are ids")
    assert (outer.variable, outer.path) == ("model", ""), changed("module_calls", "the variable is named")
    assert (inner.variable, inner.path) == ("model", "conv"), changed("module_calls", "the path is given")


def test_module_calls_of_one_module_called_twice() -> None:
    watch = Watch(lambda gm: [internals.module_calls(node)[-1].key for node in call_nodes(gm)])
    layer = nn.ReLU()
    torch.compile(lambda x: layer(layer(x)), backend=watch)(IMAGES)
    (keys,) = watch.seen
    assert len(set(keys)) == len(keys) == 2, changed("module_calls", "each call has a key of its own")


def test_module_calls_of_a_wrapped_method() -> None:
    def look(gm: fx.GraphModule) -> Any:
        frame = internals.compiled_frame()
        return frame and frame.module, [internals.module_calls(node)[0].path for node in call_nodes(gm)[:1]]

    watch, container = Watch(look), nn.Sequential(Net().eval())
    container.compile(backend=watch)
    container(IMAGES)
    ((module, paths),) = watch.seen
    wanted = ["0"] if module is container else ["conv"]
    assert paths == wanted, changed("module_calls", "paths start at the module whose method is compiled")


def test_example_value_and_is_weight_input() -> None:
    def look(gm: fx.GraphModule) -> Any:
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        shapes = [internals.example_value(node).shape for node in call_nodes(gm)]
        return [internals.is_weight_input(node) for node in inputs], shapes

    watch = Watch(look)
    model: Any = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), backend=watch)
    model(IMAGES)
    ((weights, shapes),) = watch.seen
    assert Counter(weights) == {True: 6, False: 1}, changed("is_weight_input", "inputs are named after their source")
    assert set(shapes) == {(2, 4, 4, 4)}, changed("example_value", "nodes have a fake value")
