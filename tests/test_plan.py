"""Plans as values: to JSON and back, held to their schema, and carried out on the structure they were made for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import Plan, PlanError
from fxprune.analysis import Analysis
from fxprune.plan import Candidate, IslandRecord, Totals
from fxprune.regions import Rejection


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Tiny(nn.Module):
    """A classifier of 5 classes with four removable blocks; one graph as a whole."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Detector(nn.Module):
    """Its own forward looks at values, so that `body` and `head` are captured and it stays eager around them."""

    def __init__(self, width: int = 8, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), *(Block(width) for _ in range(4)))
        if head:
            self.head = nn.Sequential(Block(width), nn.Conv2d(width, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the image is not finite")
        return self.head(self.body(x)).mean((2, 3))


def build(kind: Callable[..., nn.Module], seed: int = 0, **options: Any) -> nn.Module:
    """A model with weights and running statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**options).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
        return model


def pixels(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


LOADER = [(pixels(seed=1), torch.tensor([0, 3])), (pixels(seed=2), torch.tensor([4, 1]))]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return build(Tiny)


@pytest.fixture(scope="module")
def analysis(tiny: nn.Module) -> Analysis:
    return fxprune.analyze(tiny, LOADER)


@pytest.fixture(scope="module")
def plan(analysis: Analysis) -> Plan:
    return analysis.plan(0.3)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return build(Detector)


@pytest.fixture(scope="module")
def detector_plan(detector: nn.Module) -> Plan:
    """Takes something out of both islands."""
    cheap = ("body.1", "head.0")
    made = fxprune.analyze(detector, LOADER, criterion=lambda region, modules: float(region.name not in cheap)).plan(
        0.3
    )
    assert [region.name for region in made.removed] == [*cheap]
    return made


# To JSON and back ----------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(str(tmp_path / "plan.json"))
    assert loaded == plan
    assert loaded.removed == plan.removed
    assert len(plan.removed) == 2
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_plan_file_is_strict_json_of_this_version(plan: Plan, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert data == plan.to_dict()
    assert data["fxprune_plan"] == 1
    assert data["budget"] == 0.3
    assert [row["name"] for row in data["regions"] if row["removed"]] == [region.name for region in plan.removed]


def test_to_dict_gives_plain_data_of_its_own(plan: Plan) -> None:
    data = plan.to_dict()
    data["regions"][0]["nodes"].append("harm")
    data["settings"]["criterion"] = "harm"
    assert data != plan.to_dict()
    assert plan.settings["criterion"] == "grad_delta"


def test_a_plan_cannot_be_changed(plan: Plan) -> None:
    with pytest.raises(FrozenInstanceError):
        plan.budget = 0.5  # type: ignore[misc]


_words = st.text(max_size=8)
_names = st.lists(_words, max_size=3).map(tuple)
_numbers = st.floats(allow_nan=False, allow_infinity=False)
_counts = st.integers(0, 2**40)
_totals = st.builds(Totals, flops=_numbers, params=_counts, blocks=_counts)
_candidates = st.builds(
    Candidate,
    name=_words,
    kind=st.sampled_from(["bypass", "drop"]),
    island=_words,
    exit=_words,
    stand_in=_words,
    nodes=_names,
    layers=_names,
    score=_numbers,
    flops=_numbers,
    params=_counts,
    block=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Plan,
        budget=st.floats(0.01, 0.99),
        cost=st.sampled_from(["flops", "params", "blocks"]),
        settings=st.dictionaries(_words, st.one_of(_words, _counts, _numbers, st.none())),
        before=_totals,
        after=_totals,
        islands=st.lists(st.builds(IslandRecord, name=_words, fingerprint=_words, opaque=_names), max_size=2).map(
            tuple
        ),
        regions=st.lists(_candidates, max_size=3).map(tuple),
        rejections=st.lists(st.builds(Rejection, name=_words, reason=_words), max_size=3).map(tuple),
    )
)
def test_any_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


# The schema ----------------------------------------------------------------------------------------------------------


def changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy plain data with one field set, or gone for `...`; ``regions[0].exit`` names it."""
    data = copy.deepcopy(data)
    *way, last = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", path)]
    place: Any = data
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("budget", r"'plan' lacks \['budget'\]"),
        ("settings", r"'plan' lacks \['settings'\]"),
        ("before", "'before' should be an object"),
        ("islands", "'islands' should be a list"),
        ("after.flops", r"'after' lacks \['flops'\]"),
        ("regions[1].exit", r"'regions\[1\]' lacks \['exit'\]"),
        ("regions[0].removed", r"'regions\[0\]' lacks \['removed'\]"),
        ("islands[0].fingerprint", r"'islands\[0\]' lacks \['fingerprint'\]"),
        ("rejections[1].reason", r"'rejections\[1\]' lacks \['reason'\]"),
    ],
)
def test_a_missing_field_is_named(plan: Plan, path: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"plan field {message}"):
        Plan.from_dict(changed(plan.to_dict(), path, ...))


@pytest.mark.parametrize(
    ("path", "where"), [("note", "plan"), ("before.watts", "before"), ("regions[1].mask", r"regions\[1\]")]
)
def test_an_unknown_field_is_named(plan: Plan, path: str, where: str) -> None:
    with pytest.raises(PlanError, match=rf"plan field '{where}' has unknown \['{path.split('.')[-1]}'\]"):
        Plan.from_dict(changed(plan.to_dict(), path, 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("budget", "a tenth"),
        ("budget", True),
        ("cost", 3),
        ("settings", ["grad_delta"]),
        ("settings", None),
        ("before", [1, 2, 3]),
        ("before.params", 1.5),
        ("before.params", True),
        ("before.flops", None),
        ("islands", {"name": ""}),
        ("islands[0]", "body"),
        ("islands[0].opaque", "neck"),
        ("regions", "all"),
        ("regions[0]", None),
        ("regions[0].score", "low"),
        ("regions[0].removed", "yes"),
        ("regions[0].removed", 1),
        ("regions[0].nodes", "conv1"),
        ("regions[0].nodes", [1, 2]),
        ("regions[0].layers", [["conv1"]]),
        ("regions[0].exit", None),
        ("rejections[0].reason", 7),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(plan: Plan, path: str, value: Any) -> None:
    with pytest.raises(PlanError, match=rf"plan field '(plan\.)?{re.escape(path)}(\[0\])?' should be"):
        Plan.from_dict(changed(plan.to_dict(), path, value))


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_another_schema_version_is_refused(plan: Plan, version: Any) -> None:
    with pytest.raises(PlanError, match=f"schema version {version!r}, this fxprune reads 1"):
        Plan.from_dict({**plan.to_dict(), "fxprune_plan": version})


@pytest.mark.parametrize("data", [{}, {"budget": 0.1}, [], None, "plan.json"])
def test_something_that_is_no_plan(data: Any) -> None:
    with pytest.raises(PlanError, match="this is no fxprune plan: it has no field 'fxprune_plan'"):
        Plan.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"plan: yes"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"broken\.json: not a JSON file"):
        Plan.load(tmp_path / "broken.json")


def test_a_broken_plan_file_is_named_with_its_field(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text(json.dumps(changed(plan.to_dict(), "regions[1].exit", ...)))
    with pytest.raises(PlanError, match=r"broken\.json: plan field 'regions\[1\]' lacks \['exit'\]"):
        Plan.load(tmp_path / "broken.json")


def test_a_plan_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")


# What a plan promises ------------------------------------------------------------------------------------------------


def flops_of(model: nn.Module, count: int = 2) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels(count))
    return float(counter.get_total_flops()) / count


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("cost", ["flops", "params", "blocks"])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.6])
def test_totals_are_those_of_the_models(tiny: nn.Module, analysis: Analysis, budget: float, cost: str) -> None:
    plan = analysis.plan(budget, cost)
    pruned = fxprune.apply(tiny, plan)
    assert (plan.before.flops, plan.before.params, plan.before.blocks) == (flops_of(tiny), params_of(tiny), 4)
    assert (plan.after.flops, plan.after.params) == (flops_of(pruned), params_of(pruned))
    assert plan.after.blocks == 4 - len(plan.removed)
    before, after = getattr(plan.before, cost), getattr(plan.after, cost)
    assert 1 - after / before >= budget
    smallest = min(getattr(r, cost) if cost != "blocks" else 1 for r in plan.removed)
    assert 1 - (after + smallest) / before < budget


def test_one_analysis_serves_many_budgets(analysis: Analysis) -> None:
    counts = [len(analysis.plan(budget).removed) for budget in (0.1, 0.2, 0.4, 0.6, 0.8)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert not any(region.removed for region in analysis.regions)
    assert analysis.plan(0.4) == analysis.plan(0.4)


def test_the_least_important_regions_go(plan: Plan) -> None:
    kept = [region.score for region in plan.regions if not region.removed]
    assert max(region.score for region in plan.removed) <= min(kept)


def test_a_plan_lists_only_the_islands_it_touches(detector: nn.Module) -> None:
    analysis = fxprune.analyze(detector, LOADER)
    assert [island.name for island in analysis.islands] == ["body", "head"]
    plan = analysis.plan(0.1)
    assert {island.name for island in plan.islands} == {region.island for region in plan.removed}
    assert len(plan.islands) == 1


# Carried out ---------------------------------------------------------------------------------------------------------


def with_identities(model: nn.Module, plan: Plan) -> nn.Module:
    """The oracle: the same model with each removed block swapped by hand."""
    twin = copy.deepcopy(model)
    for region in plan.removed:
        twin.set_submodule(region.name, nn.Identity())
    return twin


def test_a_loaded_plan_does_what_the_plan_does(tiny: nn.Module, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    image, expected = pixels(3, seed=9), with_identities(tiny, plan)
    for made in (plan, Plan.load(tmp_path / "plan.json")):
        pruned = fxprune.apply(tiny, made)
        assert torch.equal(pruned(image), expected(image))
        assert pruned.state_dict().keys() == expected.state_dict().keys()
    assert not torch.equal(tiny(image), expected(image))


@pytest.mark.parametrize("kind", [Tiny, Detector])
def test_a_plan_fits_other_weights_of_the_same_structure(
    kind: Callable[..., nn.Module], request: pytest.FixtureRequest
) -> None:
    plan = request.getfixturevalue("plan" if kind is Tiny else "detector_plan")
    other = build(kind, seed=7)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    pruned, expected, image = fxprune.apply(other, plan), with_identities(other, plan), pixels(3, seed=9)
    assert torch.equal(pruned(image), expected(image))
    assert all(torch.equal(value, before[key]) for key, value in pruned.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert other.state_dict().keys() == before.keys()


def test_the_pruned_model_shares_no_weight_with_the_original(detector: nn.Module, detector_plan: Plan) -> None:
    pruned = fxprune.apply(detector, detector_plan)
    assert type(pruned) is Detector
    held = {value.data_ptr() for value in detector.state_dict().values()}
    assert not held & {value.data_ptr() for value in pruned.state_dict().values()}


def test_weights_of_a_pruned_model_go_into_another(tiny: nn.Module, plan: Plan) -> None:
    """The way to ship one: plan and state_dict, and no pickle."""
    pruned, empty = fxprune.apply(tiny, plan), fxprune.apply(build(Tiny, seed=3), Plan.from_dict(plan.to_dict()))
    image = pixels(3, seed=9)
    assert not torch.equal(empty(image), pruned(image))
    empty.load_state_dict(pruned.state_dict())
    assert torch.equal(empty(image), pruned(image))


def test_mode_and_precision_are_kept(tiny: nn.Module, plan: Plan) -> None:
    pruned = fxprune.apply(copy.deepcopy(tiny).train().to(torch.bfloat16), plan)
    assert pruned.training
    assert {value.dtype for value in pruned.parameters()} == {torch.bfloat16}


def test_a_plan_that_removes_nothing_changes_no_output(tiny: nn.Module, plan: Plan) -> None:
    nothing = replace(plan, regions=tuple(replace(region, removed=False) for region in plan.regions))
    assert torch.equal(fxprune.apply(tiny, nothing)(pixels()), tiny(pixels()))


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [None, "plan.json", {}, 0.1])
def test_apply_wants_a_plan(tiny: nn.Module, thing: Any) -> None:
    with pytest.raises(PlanError, match=rf"expected a Plan, got {type(thing).__name__}; .*Plan\.load\(path\)"):
        fxprune.apply(tiny, thing)


def test_another_width_is_another_structure(detector_plan: Plan) -> None:
    other = build(Detector, width=6)
    made_for = {island.name: island.fingerprint for island in detector_plan.islands}["body"]
    with pytest.raises(PlanError, match=rf"island 'body' .*fingerprint \w{{16}}, .*made for {made_for}: .*new plan"):
        fxprune.apply(other, detector_plan)


def test_only_the_island_that_differs_is_named(detector: nn.Module, detector_plan: Plan) -> None:
    other = copy.deepcopy(detector)
    other.set_submodule("head.1", nn.Conv2d(8, 6, 1))
    with pytest.raises(PlanError, match="island 'head' of this model has fingerprint") as caught:
        fxprune.apply(other, detector_plan)
    assert "'body'" not in str(caught.value)


def test_a_model_that_is_one_graph_is_named_as_such(plan: Plan) -> None:
    with pytest.raises(PlanError, match="island '<model>' of this model has fingerprint"):
        fxprune.apply(build(Tiny, width=6), plan)


def test_an_island_the_model_does_not_have(detector_plan: Plan) -> None:
    with pytest.raises(PlanError, match="needs island 'head', which this model does not have"):
        fxprune.apply(build(Detector, head=False), detector_plan)


def test_an_island_that_can_no_longer_be_traced(detector: nn.Module, detector_plan: Plan) -> None:
    class Moody(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else x

    other = copy.deepcopy(detector)
    other.set_submodule("head.0", Moody(8))
    with pytest.raises(PlanError, match=r"island 'head' of this model .*the structure differs"):
        fxprune.apply(other, detector_plan)


def test_another_activation_is_another_structure(tiny: nn.Module, plan: Plan) -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.conv(x)).sigmoid()

    other = copy.deepcopy(tiny)
    other.set_submodule("blocks.2", Other(8))
    with pytest.raises(PlanError, match="the structure differs"):
        fxprune.apply(other, plan)


def test_a_plan_is_carried_out_once(tiny: nn.Module, plan: Plan) -> None:
    pruned = fxprune.apply(tiny, plan)
    with pytest.raises(PlanError, match="the structure differs; analyze this model and make a new plan"):
        fxprune.apply(pruned, plan)


@pytest.mark.parametrize("field", ["exit", "stand_in"])
def test_a_region_whose_nodes_the_graph_does_not_have(tiny: nn.Module, plan: Plan, field: str) -> None:
    index = plan.regions.index(plan.removed[0])
    edited = Plan.from_dict(changed(plan.to_dict(), f"regions[{index}].{field}", "nowhere"))
    with pytest.raises(PlanError, match=rf"{re.escape(plan.removed[0].name)}.*'nowhere'"):
        fxprune.apply(tiny, edited)


def test_a_region_that_would_read_what_comes_after_it(tiny: nn.Module, plan: Plan) -> None:
    index = plan.regions.index(plan.removed[0])
    edited = Plan.from_dict(changed(plan.to_dict(), f"regions[{index}].stand_in", "fc"))
    with pytest.raises(PlanError, match=rf"{re.escape(plan.removed[0].name)}.*'fc'"):
        fxprune.apply(tiny, edited)


def test_a_region_whose_nodes_are_still_read(tiny: nn.Module, plan: Plan) -> None:
    index = plan.regions.index(plan.removed[0])
    edited = Plan.from_dict(changed(plan.to_dict(), f"regions[{index}].nodes", ["stem", *plan.removed[0].nodes]))
    with pytest.raises(PlanError, match=r"\['stem'\] should be gone but something still reads them"):
        fxprune.apply(tiny, edited)


def test_a_region_in_an_island_the_plan_does_not_list(detector: nn.Module, detector_plan: Plan) -> None:
    """It must not be passed over: the plan would say that it is gone."""
    edited = replace(detector_plan, islands=tuple(i for i in detector_plan.islands if i.name != "head"))
    with pytest.raises(PlanError, match="head"):
        fxprune.apply(detector, edited)
