"""Capture: which submodules become graphs, which stay opaque, and that graphs give the outputs of their modules."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import fxprune
from fxprune.capture.islands import capture_islands
from fxprune.capture.module_trace import Traced, Untraced, trace_module
from fxprune.errors import ModelError
from fxprune.graph.fx_utils import fingerprint
from fxprune.graph.interpreters import Graphs, run_with
from fxprune.graph.symbolic_shapes import propagate_symbolic, tensor_specs
from tests.helpers.zoo import ZOO, conv, image_batch, mean_loss


class Dropping(nn.Module):
    """Does one thing more in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.one = conv(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return x + (functional.dropout(y, 0.5) if self.training else y)


class Branching(nn.Module):
    """Decides by a value: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(4), conv(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x) if x.mean() > -1e9 else self.two(x)


class Holder(nn.Module):
    """Traceable around one part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part, self.after = conv(3, 4), part, conv(4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.after(self.part(self.stem(x))))


class Named(nn.Module):
    """Returns an OrderedDict."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 4), conv(4)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self.one(x)
        return OrderedDict([("b", x), ("a", self.two(x))])


@pytest.mark.parametrize("part", [Dropping, Branching])
def test_capture_keeps_an_untraceable_part_as_one_node(part: type[nn.Module]) -> None:
    traced = trace_module(Holder(part()), frozenset())
    assert isinstance(traced, Traced)
    assert set(traced.opaque) == {"part"}
    assert "part" in {node.target for node in traced.gm.graph.nodes if node.op == "call_module"}


@pytest.mark.parametrize("part", [Dropping, Branching])
def test_trace_module_gives_a_reason_for_untraceable_modules(part: type[nn.Module]) -> None:
    traced = trace_module(part(), frozenset())
    assert isinstance(traced, Untraced)
    assert re.search("could not be traced|train .*eval mode", traced.reason)


@pytest.mark.parametrize(
    ("part", "words"),
    [(Dropping, "train .*eval mode"), (Branching, r"Error: .*\.py, line \d+")],
)
def test_capture_of_an_untraceable_part_gives_the_reason_in_the_rejections(part: type[nn.Module], words: str) -> None:
    analysis = fxprune.analyze(Holder(part()).eval(), [image_batch()], loss=mean_loss)
    reasons = [rejection.reason for rejection in analysis.rejections if rejection.name == "part"]
    assert any(re.search(f"only its parts .*{words}", reason) for reason in reasons)


def test_trace_module_with_fixed_opaque_parts_names_the_part_that_fails() -> None:
    traced = trace_module(Holder(Branching()), frozenset(), fixed_opaque=True)
    assert isinstance(traced, Untraced)
    assert "its part 'part' is not one graph: its forward could not be traced" in traced.reason


def test_capture_of_an_untraceable_model_gives_the_reason_in_the_error() -> None:
    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) @ self.weight if float(x.sum()) > 0 else x.mean((2, 3)) @ self.weight.T

    with pytest.raises(ModelError, match="could be traced") as caught:
        fxprune.analyze(Eager(), [image_batch()], loss=mean_loss)
    assert "<model>: " in str(caught.value)
    assert "test_islands.py, line" in str(caught.value)


def test_islands_are_found_inside_opaque_modules() -> None:
    model = Holder(nn.Sequential(Dropping())).eval()
    islands, _ = capture_islands(copy.deepcopy(model), [lambda network: network(image_batch())], True)
    assert [island.name for island in islands] == ["", "part.0.one"]
    analysis = fxprune.analyze(model, [image_batch()], loss=mean_loss)
    names = {region.name for region in analysis.regions}
    assert names == {"part", "part.0.one", "after"}
    plan = analysis.plan(0.5)
    assert not {"part", "part.0.one"} <= {region.name for region in plan.removed}
    assert fxprune.apply(model, plan)(image_batch()).shape == (2, 4, 16, 12)


def test_rejection_names_the_node_without_shape_rule() -> None:
    analysis = fxprune.analyze(Holder(Branching()).eval(), [image_batch()], loss=mean_loss)
    assert [region.name for region in analysis.regions] == ["part.one"]
    reasons = {rejection.name: rejection.reason for rejection in analysis.rejections}
    assert "shape of 'part'" in reasons["after"]


def test_tracing_restores_modes() -> None:
    model = Holder(Dropping())
    model.get_submodule("part.one").eval()
    modes = [module.training for module in model.modules()]
    trace_module(model, frozenset())
    assert [module.training for module in model.modules()] == modes


def test_capture_keeps_an_ordered_dict() -> None:
    traced = trace_module(Named(), frozenset())
    assert isinstance(traced, Traced)
    output = traced.gm(image_batch())
    assert type(output) is OrderedDict
    assert list(output) == ["b", "a"]


@pytest.mark.parametrize("name", sorted(ZOO))
def test_captured_graph_gives_the_outputs_of_its_module(name: str) -> None:
    model = ZOO[name].build().eval()
    x = image_batch()
    wanted = model(x.clone())
    captured = copy.deepcopy(model)
    islands, _ = capture_islands(captured, [lambda network: network(x.clone())], True)
    assert [island.name for island in islands] == [""]
    with run_with(Graphs.of(captured, islands), lambda island, gm: fx.Interpreter(gm)):
        output = captured(x.clone())
    pairs = zip(output, wanted, strict=True) if isinstance(wanted, (list, tuple)) else [(output, wanted)]
    assert all(torch.equal(a, b) for a, b in pairs)


class Counting(nn.Module):
    """Its graph would freeze what a Python counter says at the time of tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.calls = conv(3), conv(3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.one(x) * self.calls + self.two(x)


def test_captured_graph_with_other_outputs_is_discarded() -> None:
    model = Counting()

    def run(network: nn.Module) -> Tensor:
        if isinstance(network, Counting):
            network.calls = 0
        return network(image_batch())

    islands, _ = capture_islands(model, [run], True)
    assert [island.name for island in islands] == ["one", "two"]


def test_module_with_two_names_is_one_island() -> None:
    shared = nn.Sequential(conv(4), nn.ReLU())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second = conv(3, 4), shared, shared

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.second(self.first(x)) if float(x.sum()) > -1e9 else x

    model, ran = Twice(), list[str]()
    islands, _ = capture_islands(model, [lambda network: network(image_batch())], True)
    assert [island.name for island in islands] == ["stem", "first"]

    def make(island: str, gm: fx.GraphModule) -> fx.Interpreter:
        ran.append(island)
        return fx.Interpreter(gm)

    with run_with(Graphs.of(model, islands), make):
        model(image_batch())


def test_plain_attributes_survive_capture_and_deepcopy() -> None:
    model = ZOO["split_concat"].build()
    model.f, model.i, model.type = -1, 7, "C2f"  # type: ignore[assignment]
    traced = trace_module(model, frozenset())
    assert isinstance(traced, Traced)
    twin = copy.deepcopy(traced.gm)
    assert [getattr(twin, name) for name in ("f", "i", "type")] == [-1, 7, "C2f"]


def test_fingerprint_depends_on_structure_and_not_on_weights() -> None:
    def of(model: nn.Module) -> str:
        traced = trace_module(model, frozenset())
        assert isinstance(traced, Traced)
        return fingerprint(traced.gm)

    torch.manual_seed(1)
    first = of(ZOO["chain"].build())
    torch.manual_seed(2)
    assert of(ZOO["chain"].build()) == first
    wider = ZOO["chain"].build()
    wider.head = conv(4, 3)
    assert of(wider) != first


class Tall(nn.Module):
    """Sizes whose formulas grow at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv(3) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            padded = functional.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
            x = layer(padded)[..., ::2, ::2]
        return x


def test_long_shape_formulas_are_shortened_and_stay_provable() -> None:
    traced = trace_module(Tall(), frozenset())
    assert isinstance(traced, Traced)
    signatures = propagate_symbolic(traced.gm, tensor_specs((image_batch((33, 41)),)), {})
    assert signatures.failure == ""
    names = [node.name for node in traced.gm.graph.nodes if node.name.startswith("convs")]
    assert len(names) == 4
    pads = [node.name for node in traced.gm.graph.nodes if node.name.startswith("pad")]
    assert all(signatures.provably_equal(pad, layer) for pad, layer in zip(pads, names, strict=True))
    assert not signatures.provably_equal(names[0], names[1])
