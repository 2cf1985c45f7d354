"""Pruned models against the same eager model with those blocks swapped for identities.

Bit for bit, but for the rounding of weights that were added up.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxprune
from fxprune.passes.bypass import bypass_regions
from fxprune.passes.dead_code import remove_dead_code
from fxprune.planning.analysis import exclusive_sets
from tests.helpers.removals import plan_for
from tests.helpers.zoo import ZOO, image_batch, mean_loss


def swapped(model: nn.Module, swaps: dict[str, Callable[[], nn.Module]]) -> nn.Module:
    """A copy of a model with modules replaced."""
    twin = copy.deepcopy(model)
    for path, build in swaps.items():
        owner, _, name = path.rpartition(".")
        setattr(twin.get_submodule(owner), name, build())
    return twin


CASES = [(name, region) for name, specimen in ZOO.items() for region in specimen.swaps]


@pytest.mark.parametrize(("name", "region"), CASES)
def test_removed_region_equals_an_identity(name: str, region: str) -> None:
    specimen = ZOO[name]
    model = specimen.build().eval().double()
    analysis = fxprune.analyze(model, [image_batch()], loss=mean_loss)
    pruned = fxprune.apply(model, plan_for(analysis, {region}))
    expected = swapped(model, specimen.swaps[region]).double()
    whole = model.state_dict()
    narrowed = [key for key, value in pruned.state_dict().items() if value.shape != whole[key].shape]
    assert narrowed == (["leave.weight"] if name == "split_concat" else [])
    for size in ((16, 12), (18, 22)):
        x = image_batch(size).double()
        outputs, wanted = pruned(x), expected(x)
        pairs = zip(outputs, wanted, strict=True) if isinstance(wanted, (list, tuple)) else [(outputs, wanted)]
        for a, b in pairs:
            assert torch.equal(a, b) or (narrowed and float((a - b).detach().abs().max()) < 1e-12)


class Unit(nn.Module):
    """A layer, a residual block, or a split and concatenation: each keeps (N, C, H, W)."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        half = channels // 2
        if kind == "layer":
            self.body: nn.Module = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        elif kind == "residual":
            self.body = nn.Sequential(nn.Conv2d(channels, half, 1), nn.ReLU(), nn.Conv2d(half, channels, 3, padding=1))
        else:
            self.body = nn.Conv2d(half, half, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return self.body(x)
        if self.kind == "residual":
            x = x + self.body(x)
            return torch.relu_(x)
        left, right = x.chunk(2, 1)
        return torch.cat((left, self.body(right)), 1)


class RandomNet(nn.Module):
    """Stages of units with strided layers between them, and a sum of two scales at the end."""

    def __init__(self, stages: list[list[str]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList()
        self.steps = nn.ModuleList()
        for index, kinds in enumerate(stages):
            channels = 4 * 2**index
            self.stages.append(nn.Sequential(*(Unit(kind, channels) for kind in kinds)))
            self.steps.append(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1))
        self.head = nn.Conv2d(4 * 2 ** len(stages), 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for stage, step in zip(self.stages, self.steps, strict=True):
            x = step(stage(x))
        return self.head(x)


kinds = st.lists(st.sampled_from(["layer", "residual", "concat"]), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(stages=st.lists(kinds, min_size=1, max_size=3), data=st.data())
def test_apply_to_random_graphs_removes_planned_regions_only(stages: list[list[str]], data: st.DataObject) -> None:
    torch.manual_seed(len(stages))
    model = RandomNet(stages).eval()
    analysis = fxprune.analyze(model, [image_batch((16, 16))], loss=mean_loss)
    paths = {name for name, _ in model.named_modules()}
    swappable = {region.name for region in analysis.regions if region.kind == "bypass"}
    assert swappable
    assert swappable <= paths
    chosen = data.draw(st.sets(st.sampled_from(sorted(swappable)), min_size=1))
    position = {region.name: index for index, region in enumerate(analysis.regions)}
    for some in exclusive_sets(analysis.regions):
        rivals = [index for index in sorted(some) if analysis.regions[index].name in chosen]
        chosen -= {analysis.regions[index].name for index in rivals[1:]}
    plan = plan_for(analysis, chosen)
    pruned = fxprune.apply(model, plan)
    expected = swapped(model, dict.fromkeys(sorted(chosen, key=position.__getitem__), nn.Identity))
    for size in ((16, 16), (19, 13)):
        assert torch.equal(pruned(image_batch(size)), expected(image_batch(size)))
    gone = {name for name in model.state_dict() if any(name.startswith(f"{region}.") for region in chosen)}
    assert set(pruned.state_dict()) == set(model.state_dict()) - gone


def test_removal_respects_values_overwritten_in_place() -> None:
    model = ZOO["in_place"].build().eval()
    analysis = fxprune.analyze(model, [image_batch()], loss=mean_loss)
    x = image_batch()
    inside = model.act(model.stem(x))  # type: ignore[operator]
    second = model.two(inside)  # type: ignore[operator]
    pruned = fxprune.apply(model, plan_for(analysis, {"one"}))
    assert torch.equal(pruned(x), second + inside)


def chain_of(count: int) -> fx.GraphModule:
    """A graph of so many multiplications by different constants."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for index in range(count):
        value = graph.call_function(torch.mul, (value, index + 2), name=f"n{index}")
    graph.output(value)
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_consecutive_regions_are_all_removed(order: tuple[int, int]) -> None:
    gm = chain_of(3)
    stand_ins = {0: ("n0", "x"), 1: ("n1", "n0")}
    result = bypass_regions(gm, dict(stand_ins[index] for index in order))
    remove_dead_code(gm)
    assert result.modified
    assert gm(torch.tensor(1.0)) == 4.0
    assert [node.name for node in gm.graph.nodes if node.op == "call_function"] == ["n2"]


class Scaled(nn.Module):
    """Reads a parameter of its own and one of a container."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.inner = nn.Module()
        self.inner.shift = nn.Parameter(torch.ones(3))
        self.inner.register_buffer("unused", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.inner.shift  # type: ignore[operator]


def test_parameters_of_root_and_containers_are_removed() -> None:
    gm = fx.symbolic_trace(Scaled())
    nodes = {node.name: node for node in gm.graph.nodes}
    bypass_regions(gm, {"mul": "x"})
    remove_dead_code(gm)
    assert set(gm.state_dict()) == {"inner.shift"}
    assert "scale" not in dict(gm.named_parameters())
    assert "mul" in nodes


def test_layer_called_by_another_graph_keeps_its_weights() -> None:
    shared = nn.BatchNorm2d(3)
    first, second = nn.Sequential(nn.Conv2d(3, 3, 1), shared).eval(), nn.Sequential(shared).eval()
    gm, x = fx.symbolic_trace(first), image_batch()
    bypass_regions(gm, {"_1": "_0"})
    remove_dead_code(gm)
    assert torch.equal(gm(x), first[0](x))
    assert torch.equal(second(x), shared(x))
    assert set(gm.state_dict()) == {"0.weight", "0.bias"}


def test_only_passes_write_graphs() -> None:
    root = Path(fxprune.__file__).parent
    writers = re.compile(r"erase_node|replace_all_uses_with|inserting_|\.replace_input_with")
    sources = [path for path in root.rglob("*.py") if "passes" not in path.relative_to(root).parts]
    assert len(sources) > 15
    assert [str(path) for path in sources if writers.search(path.read_text(encoding="utf-8"))] == []
