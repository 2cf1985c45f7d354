"""The torch.compile backend in its string form against `fxprune.apply` with the same plan."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional

import fxprune
from fxprune.deploy.dynamo_backend import fxprune_backend
from fxprune.planning.plan import Plan
from tests.helpers.graph_breaks import Broken, broken_plan, compiled_by
from tests.helpers.models import labelled, pixels, tiny
from tests.helpers.removals import plan_for
from tests.helpers.zoo import ZOO, image_batch, mean_loss


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny_plan(model: nn.Module, budget: float = 0.2) -> Plan:
    return fxprune.analyze(model, labelled()).plan(budget)


@pytest.mark.parametrize(
    ("name", "region"), [(name, region) for name, specimen in ZOO.items() for region in specimen.swaps]
)
def test_backend_equals_apply_for_every_region_of_the_zoo(name: str, region: str) -> None:
    model = ZOO[name].build().eval().double()
    plan = plan_for(fxprune.analyze(model, [image_batch()], loss=mean_loss), {region})
    compiled, pruned, x = compiled_by(model, plan), fxprune.apply(model, plan), image_batch().double()
    rounding = 1e-12 if name == "split_concat" else 0  # there `apply` adds weights up
    for _ in range(2):  # the second call is when regions that were not met are complained of
        torch.testing.assert_close(compiled(x), pruned(x), rtol=0, atol=rounding)


def test_inner_backend_gets_the_graph_without_removed_regions() -> None:
    model = tiny()
    plan = tiny_plan(model, 0.4)
    seen: list[int] = []

    def count(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(sum("conv2d" in str(node.target) for node in gm.graph.nodes))
        return gm

    compiled_by(model, plan, inner=count)(pixels(2, 3, 16, 16))
    left = sum(isinstance(module, nn.Conv2d) for module in fxprune.apply(model, plan).modules())
    assert seen == [left]
    assert left == 5 - len(plan.removed)


def test_backend_is_found_by_name_and_uses_inductor() -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    plan = tiny_plan(model)
    options: Any = {"plan": plan}
    compiled = torch.compile(model, backend="fxprune", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fxprune.apply(model, plan)(x), rtol=1e-4, atol=1e-5)


def test_backend_gradients_equal_those_of_apply() -> None:
    model, x = tiny().train(), pixels(4, 3, 16, 16)
    plan = tiny_plan(model)
    pruned = fxprune.apply(model, plan).train()
    twin = copy.deepcopy(model)
    compiled_by(twin, plan, inner="aot_eager")(x).square().mean().backward()
    pruned(x).square().mean().backward()
    expected = dict(pruned.named_parameters())
    for name, parameter in twin.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)
        else:
            assert parameter.grad is None
    statistics = dict(pruned.named_buffers())
    assert statistics
    assert all(torch.equal(dict(twin.named_buffers())[name], value) for name, value in statistics.items())


def test_backend_with_dynamic_shapes_compiles_once() -> None:
    model = tiny()
    plan = tiny_plan(model)
    graphs: list[Any] = []

    def note(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    compiled, pruned = compiled_by(model, plan, inner=note, dynamic=True, fullgraph=True), fxprune.apply(model, plan)
    for shape in ((2, 3, 16, 20), (3, 3, 20, 24), (5, 3, 28, 12)):  # of unequal sides: equal ones count as one
        torch.testing.assert_close(compiled(pixels(*shape)), pruned(pixels(*shape)), rtol=0, atol=0)
    assert len(graphs) == 1


class Overwriting(nn.Module):
    """What a bypass lets live longer is overwritten right after: the entry is read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.layer(x)
        y += 1
        y = functional.relu6(y, True)
        return self.head(y) * x


def test_overwritten_stand_in_is_not_seen_by_other_readers() -> None:
    torch.manual_seed(0)
    model = Overwriting().eval()
    plan = plan_for(fxprune.analyze(model, [image_batch()], loss=mean_loss), {"layer"})
    expected = fxprune.apply(model, plan)(image_batch())
    torch.testing.assert_close(compiled_by(model, plan)(image_batch()), expected, rtol=0, atol=0)


class Levels(nn.Module):
    """One island run at two levels, in a loop that no graph of the whole model holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.head(level) for level in levels]


def test_island_called_several_times_is_pruned_each_time() -> None:
    torch.manual_seed(0)
    model, levels = Levels().eval(), [image_batch((8, 8)), image_batch((4, 4))]
    analysis = fxprune.analyze(model, [levels], loss=lambda net, batch: sum(y.square().mean() for y in net(batch)))
    plan = plan_for(analysis, {"head.1"})
    compiled, pruned = compiled_by(model, plan), fxprune.apply(model, plan)
    for _ in range(2):
        torch.testing.assert_close(compiled(levels), pruned(levels), rtol=0, atol=0)


def test_module_compile_in_place_is_pruned() -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    plan = tiny_plan(model)
    expected = fxprune.apply(model, plan)(x)
    model.compile(backend=fxprune_backend, options={"plan": plan, "inner": "eager"})
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class Outer(nn.Module):
    """Calls a compiled model from a loop that Dynamo leaves to Python."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            torch._dynamo.graph_break()
            x = self.inner(x)
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_model_inside_another_compiled_model_is_pruned(in_place: bool) -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    plan = tiny_plan(model)
    expected = fxprune.apply(model, plan)(x)
    options: Any = {"plan": plan, "inner": "eager"}
    if in_place:
        model.compile(backend="fxprune", options=options)
    outer: Any = torch.compile(Outer(model if in_place else compiled_by(model, plan)), backend=unseen_inside)
    for _ in range(2):
        torch.testing.assert_close(outer(x), expected)


def unseen_inside(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend for graphs without convolutions: those are compiled by another."""
    assert not any("conv" in str(node.target) for node in gm.graph.nodes)
    return gm


def test_two_models_of_one_class_keep_their_own_weights() -> None:
    first, x = tiny(), pixels(2, 3, 16, 16)
    plan = tiny_plan(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.get_parameter("fc.bias").add_(1)
    for model in (first, second, first):
        torch.testing.assert_close(compiled_by(model, plan)(x), fxprune.apply(model, plan)(x))


def test_region_cut_by_a_graph_break_is_refused() -> None:
    compiled = compiled_by(Broken("inside").eval(), broken_plan())
    with pytest.raises(BackendCompilerFailed, match=r"part of region 'blocks.0'.*graph break"):
        compiled(pixels(2, 3, 16, 16))


def test_region_met_in_no_graph_raises_at_the_second_call() -> None:
    compiled = compiled_by(Broken("around").eval(), broken_plan())
    compiled(pixels(2, 3, 16, 16))
    for _ in range(2):
        with pytest.raises(fxprune.PlanError, match=r"met in no graph.*'blocks.0'"):
            compiled(pixels(2, 3, 16, 16))


def test_region_met_in_no_graph_warns_at_exit() -> None:
    code = (
        "from tests.helpers.graph_breaks import Broken, broken_plan, compiled_by;"
        "from tests.helpers.models import pixels;"
        "compiled_by(Broken('around').eval(), broken_plan())(pixels(2, 3, 16, 16))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "met in no graph" in done.stderr
    assert "blocks.0" in done.stderr


def failing(options: Any) -> str:
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as failure:
        torch.compile(tiny(), backend=fxprune_backend, options=options)(pixels(1, 3, 16, 16))
    inner = failure.value.inner_exception
    assert isinstance(inner, fxprune.FxpruneError)
    return str(inner)


def test_bad_options_are_refused(tmp_path: Path) -> None:
    plan = tiny_plan(tiny())
    assert "needs a plan" in failing(None)
    assert "needs a plan" in failing({"inner": "eager"})
    assert "no option 'plam'" in failing({"plan": plan, "plam": 1})
    assert "'plan' is a int" in failing({"plan": 3})
    assert "'inner' is 'fxprune'" in failing({"plan": plan, "inner": "fxprune"})
    assert "'inner' is 'nope'" in failing({"plan": plan, "inner": "nope"})
    assert "No such file" in failing({"plan": str(tmp_path / "absent.json")})
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json" in failing({"plan": tmp_path / "bad.json"})
    other = plan_for(fxprune.analyze(ZOO["residual"].build(), [image_batch()], loss=mean_loss), {"a..b"})
    assert "the structure differs" in failing({"plan": other})


def test_function_is_refused() -> None:
    model = tiny()
    options: Any = {"plan": tiny_plan(model), "inner": "eager"}
    compiled = torch.compile(lambda x: model(x), backend=fxprune_backend, options=options)
    with pytest.raises(BackendCompilerFailed, match=r"compiles modules.*or give backend=fxprune\.pruning_backend"):
        compiled(pixels(1, 3, 16, 16))


def test_plan_file_changed_after_compiling_is_refused_until_reset(tmp_path: Path) -> None:
    model, x, file = tiny(), pixels(2, 3, 16, 16), tmp_path / "plan.json"
    plans = [tiny_plan(model, budget) for budget in (0.1, 0.5)]
    plans[0].save(file)
    compiled = compiled_by(model, file)
    torch.testing.assert_close(compiled(x), fxprune.apply(model, plans[0])(x), rtol=0, atol=0)
    plans[1].save(file)
    os.utime(file, ns=(1, 1))
    with pytest.raises(fxprune.PlanError, match=r"changed after it was compiled.*reset"):
        compiled(x)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled_by(model, file)(x), fxprune.apply(model, plans[1])(x), rtol=0, atol=0)


def test_plan_file_may_be_deleted_after_compiling(tmp_path: Path) -> None:
    model, x, file = tiny(), pixels(2, 3, 16, 16), tmp_path / "plan.json"
    tiny_plan(model).save(file)
    compiled = compiled_by(model, file)
    expected = compiled(x)
    file.unlink()
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


def test_inductor_cache_distinguishes_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = tiny(), pixels(2, 3, 16, 16)
    for plan in (tiny_plan(model, 0.1), tiny_plan(model, 0.5)):
        torch._dynamo.reset()
        with torch.no_grad():
            found = compiled_by(model, plan, inner="inductor")(x)
            torch.testing.assert_close(found, fxprune.apply(model, plan)(x), rtol=1e-4, atol=1e-5)
