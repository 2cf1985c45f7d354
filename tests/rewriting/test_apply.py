"""`fxprune.apply` on the structure a plan was made for, and its errors on any other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x0_5

import fxprune
from fxprune import Plan, PlanError
from tests.helpers.hostile import changed
from tests.helpers.models import Block, Detector, Tiny, build, labelled, params_of, pixels
from tests.helpers.paths import DATA

# Carried out ---------------------------------------------------------------------------------------------------------


def with_identities(model: nn.Module, plan: Plan) -> nn.Module:
    """The oracle: the same model with each removed block swapped by hand."""
    twin = copy.deepcopy(model)
    for region in plan.removed:
        twin.set_submodule(region.name, nn.Identity())
    return twin


def test_apply_of_a_loaded_plan_equals_apply_of_the_plan(tiny_model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    image, expected = pixels(3, 3, 16, 16, seed=9), with_identities(tiny_model, plan)
    for made in (plan, Plan.load(tmp_path / "plan.json")):
        pruned = fxprune.apply(tiny_model, made)
        assert torch.equal(pruned(image), expected(image))
        assert pruned.state_dict().keys() == expected.state_dict().keys()
    assert not torch.equal(tiny_model(image), expected(image))


@pytest.mark.parametrize("kind", [Tiny, Detector])
def test_apply_accepts_other_weights_of_the_same_structure(
    kind: Callable[..., nn.Module], request: pytest.FixtureRequest
) -> None:
    plan = request.getfixturevalue("plan" if kind is Tiny else "detector_plan")
    other = build(kind, seed=7)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    pruned, expected, image = fxprune.apply(other, plan), with_identities(other, plan), pixels(3, 3, 16, 16, seed=9)
    assert torch.equal(pruned(image), expected(image))
    assert all(torch.equal(value, before[key]) for key, value in pruned.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert other.state_dict().keys() == before.keys()


class Around(nn.Module):
    """A graph as a whole, of which a detector is one node; that one has graphs of its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.fc = Block(3), Detector(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.part(self.first(x)))


def test_apply_reaches_graphs_nested_in_a_node() -> None:
    model = build(Around)
    wanted = ["first", "part.body.2", "part.head.0"]
    analysis = fxprune.analyze(model, labelled(), criterion=lambda region, _: float(region.name not in wanted))
    assert [island.name for island in analysis.islands] == ["", "part.body", "part.head"]
    plan = analysis.plan(3 / 6, cost="blocks")
    assert [region.name for region in plan.removed] == wanted
    image, expected = pixels(3, 3, 16, 16, seed=9), with_identities(model, plan)
    assert torch.equal(fxprune.apply(model, plan)(image), expected(image))
    assert fxprune.compile(model, labelled(), 0.2)(image).shape == (3, 5)


def test_apply_shares_no_weight_with_the_original(detector: nn.Module, detector_plan: Plan) -> None:
    pruned = fxprune.apply(detector, detector_plan)
    assert type(pruned) is Detector
    held = {value.data_ptr() for value in detector.state_dict().values()}
    assert not held & {value.data_ptr() for value in pruned.state_dict().values()}


def test_pruned_state_dict_loads_into_another_pruned_model(tiny_model: nn.Module, plan: Plan) -> None:
    """The way to ship one: plan and state_dict, and no pickle."""
    pruned, empty = fxprune.apply(tiny_model, plan), fxprune.apply(build(Tiny, seed=3), Plan.from_dict(plan.to_dict()))
    image = pixels(3, 3, 16, 16, seed=9)
    assert not torch.equal(empty(image), pruned(image))
    empty.load_state_dict(pruned.state_dict())
    assert torch.equal(empty(image), pruned(image))


def test_apply_keeps_mode_and_precision(tiny_model: nn.Module, plan: Plan) -> None:
    pruned = fxprune.apply(copy.deepcopy(tiny_model).train().to(torch.bfloat16), plan)
    assert pruned.training
    assert {value.dtype for value in pruned.parameters()} == {torch.bfloat16}


def test_apply_of_an_empty_plan_changes_no_output(tiny_model: nn.Module, plan: Plan) -> None:
    nothing = replace(plan, regions=tuple(replace(region, removed=False) for region in plan.regions))
    assert torch.equal(fxprune.apply(tiny_model, nothing)(pixels(2, 3, 16, 16)), tiny_model(pixels(2, 3, 16, 16)))


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, "plan.json", {}, 0.1])
def test_apply_refuses_what_is_no_plan(tiny_model: nn.Module, thing: Any) -> None:
    with pytest.raises(PlanError, match=rf"a Plan, got {type(thing).__name__}; .*Plan\.load"):
        fxprune.apply(tiny_model, thing)


def test_apply_refuses_another_width(detector_plan: Plan) -> None:
    other = build(Detector, width=6)
    made_for = {island.name: island.fingerprint for island in detector_plan.islands}["body"]
    with pytest.raises(PlanError, match=rf"'body' .*\w{{16}}, .*made for {made_for}: .*new plan"):
        fxprune.apply(other, detector_plan)


def test_apply_names_the_island_that_differs_only(detector: nn.Module, detector_plan: Plan) -> None:
    other = copy.deepcopy(detector)
    other.set_submodule("head.1", nn.Conv2d(8, 6, 1))
    with pytest.raises(PlanError, match=r"'head' .*has fingerprint") as caught:
        fxprune.apply(other, detector_plan)
    assert "'body'" not in str(caught.value)


def test_apply_names_a_whole_model_as_island(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"'<model>' .*has fingerprint"):
        fxprune.apply(build(Tiny, width=6), plan)


def test_apply_refuses_a_plan_with_an_island_the_model_lacks(detector_plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"'head'.*does not have"):
        fxprune.apply(build(Detector, head=False), detector_plan)


def test_apply_refuses_an_island_that_cannot_be_traced(detector: nn.Module, detector_plan: Plan) -> None:
    class Moody(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else x

    other = copy.deepcopy(detector)
    other.set_submodule("head.0", Moody(8))
    with pytest.raises(PlanError, match=r"'head' .*structure differs"):
        fxprune.apply(other, detector_plan)


def test_apply_refuses_another_activation(tiny_model: nn.Module) -> None:
    class Other(Block):
        """Its activation is a method of the tensor."""

        def __init__(self, activation: str) -> None:
            super().__init__(8)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return x + getattr(self.norm(self.conv(x)), self.activation)()

    known, other = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    known.set_submodule("blocks.2", Other("relu"))
    other.set_submodule("blocks.2", Other("sigmoid"))
    plan = fxprune.analyze(known, labelled()).plan(0.3)
    fxprune.apply(known, plan)
    with pytest.raises(PlanError, match="the structure differs"):
        fxprune.apply(other, plan)


def test_apply_refuses_a_layer_of_another_class(tiny_model: nn.Module, plan: Plan) -> None:
    other = copy.deepcopy(tiny_model)
    other.set_submodule("blocks.2.act", nn.Sigmoid())
    with pytest.raises(PlanError, match="the structure differs"):
        fxprune.apply(other, plan)


@pytest.mark.parametrize(
    ("file", "make"),
    [("detector", lambda: build(Detector)), ("shufflenet", lambda: shufflenet_v2_x0_5(weights=None))],
)
def test_apply_accepts_plans_made_with_torch_2_11(file: str, make: Callable[[], nn.Module]) -> None:
    plan = Plan.load(DATA / f"{file}_torch_2.11.json")
    assert plan.settings["versions"]["torch"].startswith("2.11.")
    pruned = fxprune.apply(make().eval(), plan)
    assert params_of(pruned) == plan.after.params < plan.before.params


def test_apply_names_other_versions_of_a_plan_that_does_not_fit(tiny_model: nn.Module, plan: Plan) -> None:
    other = copy.deepcopy(tiny_model)
    other.set_submodule("blocks.2.act", nn.Sigmoid())
    versions = {"torch": "2.11.0+cpu", "torchvision": "0.26.0"}
    old = replace(plan, settings=plan.settings.with_entries(versions=versions))
    with pytest.raises(PlanError, match=r"differs \(.*torch 2\.11\.0, .*torchvision 0\.26\.0"):
        fxprune.apply(other, old)


def test_apply_refuses_a_plan_applied_before(tiny_model: nn.Module, plan: Plan) -> None:
    pruned = fxprune.apply(tiny_model, plan)
    with pytest.raises(PlanError, match=r"structure differs.*a new plan"):
        fxprune.apply(pruned, plan)


@pytest.mark.parametrize("field", ["exit", "stand_in"])
def test_apply_refuses_a_region_with_unknown_nodes(tiny_model: nn.Module, plan: Plan, field: str) -> None:
    index = plan.regions.index(plan.removed[0])
    edited = Plan.from_dict(changed(plan.to_dict(), f"regions[{index}].{field}", "nowhere"))
    with pytest.raises(PlanError, match=rf"{re.escape(plan.removed[0].name)}.*'nowhere'"):
        fxprune.apply(tiny_model, edited)


def test_apply_refuses_a_stand_in_after_the_region(tiny_model: nn.Module, plan: Plan) -> None:
    index = plan.regions.index(plan.removed[0])
    edited = Plan.from_dict(changed(plan.to_dict(), f"regions[{index}].stand_in", "fc"))
    with pytest.raises(PlanError, match=rf"{re.escape(plan.removed[0].name)}.*'fc'"):
        fxprune.apply(tiny_model, edited)


def test_apply_refuses_a_region_that_is_still_read(tiny_model: nn.Module, plan: Plan) -> None:
    index = plan.regions.index(plan.removed[0])
    edited = Plan.from_dict(changed(plan.to_dict(), f"regions[{index}].nodes", ["stem", *plan.removed[0].nodes]))
    with pytest.raises(PlanError, match=r"stem .*still reads"):
        fxprune.apply(tiny_model, edited)


def test_apply_refuses_a_region_in_an_unlisted_island(detector: nn.Module, detector_plan: Plan) -> None:
    """It must not be passed over: the plan would say that it is gone."""
    edited = replace(detector_plan, islands=tuple(i for i in detector_plan.islands if i.name != "head"))
    with pytest.raises(PlanError, match="head"):
        fxprune.apply(detector, edited)
