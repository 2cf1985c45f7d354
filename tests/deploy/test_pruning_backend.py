"""`fxprune.pruning_backend` against `fxprune.apply` with the same plan."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from fxprune.planning.plan import Plan
from tests.helpers.graph_breaks import Broken, broken_plan, compiled_by
from tests.helpers.models import Encoder, build, labelled, pixels, tiny
from tests.helpers.removals import plan_for
from tests.helpers.zoo import ZOO, image_batch, mean_loss

pytestmark = pytest.mark.usefixtures("forget_compiled_code")

graph_break: Any = torch._dynamo.graph_break
Form = Callable[[nn.Module, Any], Callable[[Tensor], Tensor]]


def as_module(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def in_function(model: nn.Module, backend: Any) -> Any:
    return torch.compile(lambda x: model(x) + 1 - 1, backend=backend)


def in_another_module(model: nn.Module, backend: Any) -> Any:
    return torch.compile(nn.Sequential(model, nn.Identity()), backend=backend)


FORMS = [as_module, in_place, in_function, in_another_module]


@pytest.fixture(scope="module")
def tiny_plan() -> Plan:
    return fxprune.analyze(tiny(), labelled()).plan(0.3)


# It gives what `apply` gives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_pruning_backend_works_in_every_form_of_compile(form: Form, tiny_plan: Plan) -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    expected = fxprune.apply(model, tiny_plan)(x)
    compiled = form(model, fxprune.pruning_backend(model, tiny_plan, inner="eager"))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("name", ["residual", "split_concat"])
def test_pruning_backend_equals_apply_on_the_zoo(name: str) -> None:
    model = ZOO[name].build().eval().double()
    plan = plan_for(fxprune.analyze(model, [image_batch()], loss=mean_loss), set(list(ZOO[name].swaps)[:1]))
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, plan, inner="eager"))
    for _ in range(2):
        torch.testing.assert_close(compiled(image_batch().double()), fxprune.apply(model, plan)(image_batch().double()))


@pytest.mark.parametrize("name", ["layers.1", "layers.0.attention", "layers.2.mlp"])
def test_pruning_backend_equals_apply_on_an_encoder(name: str) -> None:
    model, x = build(Encoder), pixels(2, 3, 16, 16)
    plan = plan_for(fxprune.analyze(model, labelled(), criterion="l1"), {name})
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, plan, inner="eager"))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), fxprune.apply(model, plan)(x))


def test_mode_and_options_reach_inductor(tiny_plan: Plan) -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    backend = fxprune.pruning_backend(model, tiny_plan, inner_options={"max_autotune": False})
    compiled = torch.compile(model, backend=backend, mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fxprune.apply(model, tiny_plan)(x), rtol=1e-4, atol=1e-5)


def test_options_reach_another_inner_backend(tiny_plan: Plan) -> None:
    seen: list[Any] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        seen.append(settings)
        return gm

    model = tiny()
    backend = fxprune.pruning_backend(model, tiny_plan, inner, {"level": 3})
    torch.compile(model, backend=backend, mode="reduce-overhead")(pixels(2, 3, 16, 16))
    assert seen == [{"mode": "reduce-overhead", "options": {"level": 3}}]


def test_new_shapes_are_pruned(tiny_plan: Plan) -> None:
    model = tiny()
    pruned = fxprune.apply(model, tiny_plan)
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, tiny_plan, inner="eager"), dynamic=False)
    for size in (16, 20, 24, 16):
        x = pixels(2, 3, size, size)
        torch.testing.assert_close(compiled(x), pruned(x))


def test_forward_hook_of_the_model_is_no_part_of_the_plan(tiny_plan: Plan) -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    expected = fxprune.apply(model, tiny_plan)(x + 1)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))  # an addition, as in every block
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, tiny_plan, inner="eager"))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)


# Graph breaks --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).relu()


class Separate(nn.Module):
    """Dynamo compiles each block by itself, and all blocks have the same code."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = True
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.broken:
                graph_break()
            x = block(x)
        return x.mean((2, 3))


def separate_blocks(*regions: str) -> tuple[nn.Module, Plan, Tensor]:
    """A model whose blocks are compiled one by one, a plan that removes some, and what the pruned model outputs."""
    model = Separate().eval()
    model.broken = False
    plan = plan_for(fxprune.analyze(model, labelled()), set(regions))
    expected = fxprune.apply(model, plan)(pixels(2, 3, 16, 16))
    model.broken = True
    return model, plan, expected


@pytest.mark.parametrize("regions", [["blocks.0"], ["blocks.1"], ["blocks.0", "blocks.2"]])
def test_equal_modules_do_not_share_compiled_code(regions: list[str]) -> None:
    model, plan, expected = separate_blocks(*regions)
    for compiled in (as_module(model, fxprune.pruning_backend(model, plan, "eager")), compiled_by(model, plan)):
        torch._dynamo.reset()
        for _ in range(2):
            torch.testing.assert_close(compiled(pixels(2, 3, 16, 16)), expected)


def test_later_calls_recompile_nothing() -> None:
    model, plan, _ = separate_blocks("blocks.1")
    graphs: list[Any] = []

    def note(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, plan, note))
    compiled(pixels(2, 3, 16, 16))
    first = len(graphs)
    compiled(pixels(2, 3, 16, 16))
    assert len(graphs) == first


class Repeated(nn.Module):
    """Its first graph runs twice before its second one is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = True
        self.head, self.tail = Residual(), Residual()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if self.broken:
                graph_break()
            x = self.head(x)
        return self.tail(x)


def test_graph_that_runs_twice_in_one_call_counts_as_one_call() -> None:
    model, x = Repeated().eval(), torch.rand(2, 8, 4, 4)
    model.broken = False
    plan = plan_for(fxprune.analyze(model, [x], loss=mean_loss), {"tail"})
    expected = fxprune.apply(model, plan)(x)
    model.broken = True
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, plan, "eager"))
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)


def test_region_cut_by_a_graph_break_is_refused() -> None:
    model = Broken("inside").eval()
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, broken_plan(), "eager"))
    with pytest.raises(BackendCompilerFailed, match=r"part of region 'blocks.0'.*graph break"):
        compiled(pixels(2, 3, 16, 16))


@pytest.mark.parametrize("form", FORMS)
def test_region_met_in_no_graph_raises_at_the_second_call(form: Form) -> None:
    model, x = Broken("around").eval(), pixels(2, 3, 16, 16)
    compiled = form(model, fxprune.pruning_backend(model, broken_plan(), "eager"))
    compiled(x)
    if form is not in_place:
        model(x)  # a call of the model that was not compiled
    for _ in range(2):
        with pytest.raises(fxprune.PlanError, match=r"met in no graph.*'blocks.0'.*Graph breaks"):
            compiled(x)


def test_region_met_in_no_graph_warns_when_the_model_is_deleted() -> None:
    plan = broken_plan()

    def call_once() -> None:
        model = Broken("around").eval()
        torch.compile(model, backend=fxprune.pruning_backend(model, plan, "eager"))(pixels(2, 3, 16, 16))
        del model
        gc.collect()

    with pytest.warns(fxprune.FxpruneWarning, match=r"met in no graph.*'blocks.0'"):
        call_once()


def test_other_model_is_not_pruned_and_refused_at_the_second_call(tiny_plan: Plan) -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    compiled = torch.compile(copy.deepcopy(model), backend=fxprune.pruning_backend(model, tiny_plan, "eager"))
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(fxprune.PlanError, match="backend was made for"):
        compiled(x)


# The model stays as it was -------------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> dict[str, dict[str, int | None]]:
    """Attributes of every part of a model, with the lengths of those that are dicts: hooks and the like."""
    return {
        path: {name: len(value) if isinstance(value, dict) else None for name, value in vars(part).items()}
        for path, part in model.named_modules()
    }


@pytest.mark.parametrize("form", FORMS)
def test_copies_of_the_model_have_no_extra_attributes(form: Form) -> None:
    model, twin, x = Broken("around").eval(), Broken("around").eval(), pixels(2, 3, 16, 16)
    form(twin, "eager")(x)
    compiled = form(model, fxprune.pruning_backend(model, broken_plan(), "eager"))
    compiled(x)
    assert attributes(copy.deepcopy(model)) == attributes(copy.deepcopy(twin))
    with pytest.raises(fxprune.PlanError, match="met in no graph"):
        compiled(x)


def test_compiled_model_is_pickled_without_the_backend(tiny_plan: Plan) -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    expected = model(x)
    in_place(model, fxprune.pruning_backend(model, tiny_plan, "eager"))(x)
    data = pickle.dumps(model)
    assert b"fxprune" not in data
    torch.testing.assert_close(pickle.loads(data)(x), expected)


def test_backend_does_not_keep_the_model_alive(tiny_plan: Plan) -> None:
    model = tiny()
    backend = fxprune.pruning_backend(model, tiny_plan, "eager")
    compiled = torch.compile(model, backend=backend)
    compiled(pixels(2, 3, 16, 16))
    reference = weakref.ref(model)
    del model, compiled
    gc.collect()
    assert reference() is None
    with pytest.raises(fxprune.ModelError, match="does not exist any more"):
        pickle.dumps(backend)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda compiled: pickle.loads(pickle.dumps(compiled))])
def test_copy_of_the_compiled_model_is_pruned(copied: Callable[[Any], Any], tiny_plan: Plan) -> None:
    model, x = tiny(), pixels(2, 3, 16, 16)
    expected = fxprune.apply(model, tiny_plan)(x)
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, tiny_plan, "eager"))
    compiled(x)
    twin = copied(compiled)
    del model, compiled
    gc.collect()
    for _ in range(2):
        torch.testing.assert_close(twin(x), expected)


def test_reset_restarts_the_count_of_calls() -> None:
    model, x = Broken("around").eval(), pixels(2, 3, 16, 16)
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, broken_plan(), "eager"))
    compiled(x)
    torch.compiler.reset()
    compiled(x)
    with pytest.raises(fxprune.PlanError, match="met in no graph"):
        compiled(x)


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_at_once(tiny_plan: Plan) -> None:
    model = tiny()
    other = ZOO["residual"].build()
    with pytest.raises(fxprune.PlanError, match="the structure differs"):
        fxprune.pruning_backend(other, tiny_plan)
    with pytest.raises(fxprune.PlanError, match=r"a Plan, got str; .*Plan\.load"):
        fxprune.pruning_backend(model, "plan.json")  # type: ignore[arg-type]
    with pytest.raises(fxprune.ModelError, match=r"expected a torch\.nn\.Module, got int"):
        fxprune.pruning_backend(3, tiny_plan)  # type: ignore[arg-type]
    with pytest.raises(fxprune.ModelError, match="wrapped in OptimizedModule"):
        fxprune.pruning_backend(torch.compile(model), tiny_plan)  # type: ignore[arg-type]
    for inner in ("fxprune", 3):
        with pytest.raises(fxprune.SettingError, match=r"'inner' is .*another backend"):
            fxprune.pruning_backend(model, tiny_plan, inner)  # type: ignore[arg-type]
    with pytest.raises(fxprune.SettingError, match="'inner' is 'nope'"):
        fxprune.pruning_backend(model, tiny_plan, "nope")


def test_options_of_torch_compile_are_refused(tiny_plan: Plan) -> None:
    model = tiny()
    compiled: Any = torch.compile(
        model, backend=fxprune.pruning_backend(model, tiny_plan), options={"max_autotune": True}
    )
    with pytest.raises(BackendCompilerFailed, match="as inner_options"):
        compiled(pixels(2, 3, 16, 16))
