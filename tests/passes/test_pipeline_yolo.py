"""All clean-ups on YOLOv8n: convolutions get narrower, and the model stays a YOLOv8n."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Plan
from fxprune.passes.concat import NARROWED_WEIGHTS
from fxprune.passes.dead_code import remove_dead_code
from fxprune.rewriting import edits, whole_graph
from tests.helpers.cases import SMALL, give_values
from tests.helpers.concatenations import Joining, narrow, traced
from tests.helpers.flops import flops_of
from tests.helpers.models import params_of, pixels
from tests.helpers.systems import SIX

pytest.importorskip("ultralytics")

(SYSTEM,) = (system for system in SIX if system.name == "yolov8n")
GONE = {"model.4.m.0", "model.6.m.0", "model.6.m.1", "model.12.m.0.cv1", "model.12.m.0.cv2"}
"""Leaves the second block of `model.4`, and of `model.6` and `model.12` what enters and what leaves."""
NARROWER = {"model.4.cv2": (128, 96), "model.6.cv2": (256, 128), "model.12.cv2": (192, 128)}
"""Channels that are read, before and after."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model, batch = SYSTEM.build(SMALL, 2)
    give_values(model, batch["img"])
    return model


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return plan_without(model, GONE)


def plan_without(model: nn.Module, names: set[str]) -> Plan:
    """A plan that removes just the named regions, with the totals that follow from it."""
    _, batch = SYSTEM.build(SMALL, 2)
    analysis = fxprune.analyze(model, [batch], criterion=lambda region, _: float(region.name not in names))
    budget = sum(region.flops for region in analysis.regions if region.name in names) / analysis.before.flops
    plan = analysis.plan(budget * 0.999)
    assert {region.name for region in plan.removed} == names
    return plan


@pytest.fixture(scope="module")
def pruned(model: nn.Module, plan: Plan) -> nn.Module:
    return fxprune.apply(model, plan)


def as_they_were(model: nn.Module, plan: Plan) -> nn.Module:
    """The plan carried out without clean-ups."""

    def dead_code_alone(gm: Any, channels: Any, model: Any) -> Any:
        gm.meta[NARROWED_WEIGHTS] = {}
        return remove_dead_code(gm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_graph, "simplify", dead_code_alone)
        patch.setattr(edits, "simplify", dead_code_alone)
        return fxprune.apply(model, plan)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = copy.deepcopy(model).eval()(x)[0]  # a call leaves anchors behind
    return found


def distance(first: Tensor, second: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert first.shape == second.shape
    assert float(second.abs().max()) > 1
    return float((first - second).abs().max() / second.abs().max())


X = pixels(2, 3, 96, 128, seed=5)


def test_pruned_yolo_convolutions_are_narrower_and_keep_their_class(model: nn.Module, pruned: nn.Module) -> None:
    for path, (before, after) in NARROWER.items():
        was, now = model.get_submodule(path), pruned.get_submodule(path)
        assert type(now) is type(was)
        assert (was.conv.in_channels, now.conv.in_channels) == (before, after)  # type: ignore[union-attr]
        assert pruned.get_parameter(f"{path}.conv.weight").shape[1] == after
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    other = {key for key, value in pruned.state_dict().items() if value.shape != shapes[key]}
    assert other == {f"{path}.conv.weight" for path in NARROWER}


def test_concat_is_gone_where_all_blocks_are_removed(pruned: nn.Module) -> None:
    part: Any = pruned.get_submodule("model.6")
    assert [node.name for node in part.graph.nodes] == ["x", "cv1", "cv2", "output"]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_clean_ups_keep_outputs(
    model: nn.Module, plan: Plan, dtype: torch.dtype, rounding: float, channels_last: bool
) -> None:
    memory = torch.channels_last if channels_last else torch.contiguous_format
    whole = copy.deepcopy(model).to(dtype).to(memory_format=memory)
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    x = X.to(dtype).contiguous(memory_format=memory)
    clean, plain = fxprune.apply(whole, plan), as_they_were(whole, plan)
    assert params_of(clean) < params_of(plain)
    assert distance(outputs(clean, x), outputs(plain, x)) < rounding
    assert distance(outputs(clean, x), outputs(whole, x)) > 1e-3
    assert whole.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items())


def test_report_counts_savings_of_clean_ups(model: nn.Module, plan: Plan, pruned: nn.Module) -> None:
    report = fxprune.report(pruned)
    assert report.after.params == params_of(pruned) < plan.after.params == params_of(as_they_were(model, plan))
    twice = flops_of(copy.deepcopy(model), X), flops_of(copy.deepcopy(pruned), X)
    assert twice[1] / twice[0] == pytest.approx(report.after.flops / report.before.flops, rel=1e-3)
    assert report.after.flops < plan.after.flops * 0.999
    assert fxprune.report(plan).after == plan.after
    assert fxprune.report(copy.deepcopy(pruned)).to_dict() == report.to_dict()


def test_narrowed_yolo_is_saved_and_loaded_bit_for_bit(model: nn.Module, pruned: nn.Module, tmp_path: Path) -> None:
    fxprune.save(pruned, tmp_path / "pruned")
    again = fxprune.load(SYSTEM.build(replace(SMALL, seed=3))[0], tmp_path / "pruned")
    assert torch.equal(outputs(again, X), outputs(pruned, X))
    assert again.state_dict().keys() == pruned.state_dict().keys()
    assert fxprune.report(again).to_dict() == fxprune.report(pruned).to_dict()


def test_narrowed_yolo_can_be_pruned_again_and_saved(model: nn.Module, pruned: nn.Module, tmp_path: Path) -> None:
    """The second plan takes the last block of `model.4`, whose convolution is narrower already."""
    twice = fxprune.apply(pruned, plan_without(pruned, {"model.4.m.1"}))
    assert twice.get_submodule("model.4.cv2").conv.in_channels == 64  # type: ignore[union-attr]
    assert fxprune.report(twice).after.params == params_of(twice) < params_of(pruned)
    fxprune.save(twice, tmp_path / "twice")
    again = fxprune.load(SYSTEM.build(replace(SMALL, seed=3))[0], tmp_path / "twice")
    assert torch.equal(outputs(again, X), outputs(twice, X))
    at_once = as_they_were(model, plan_without(model, {*GONE, "model.4.m.1"}))
    assert distance(outputs(twice, X), outputs(at_once, X)) < 1e-5


def test_narrowed_yolo_can_be_fused_copied_and_pickled(pruned: nn.Module, tmp_path: Path) -> None:
    expected = outputs(pruned, X)
    assert torch.equal(outputs(copy.deepcopy(pruned), X), expected)
    fused: Any = copy.deepcopy(pruned)
    fused.fuse(verbose=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert distance(outputs(fused, X), expected) < 1e-5
    torch.save(pruned, tmp_path / "pruned.pt")
    loaded = torch.load(tmp_path / "pruned.pt", weights_only=False).eval()
    with torch.no_grad():
        assert torch.equal(loaded(X)[0], expected)


def test_part_of_a_narrowed_yolo_is_exported(pruned: nn.Module) -> None:
    part, x = pruned.get_submodule("model.6").eval(), pixels(1, 128, 8, 8)
    program = torch.export.export(part, (x,))
    torch.testing.assert_close(program.module()(x), part(x))
    assert program.state_dict["cv2.conv.weight"].shape[1] == 128


def test_narrowed_weights_get_gradients(pruned: nn.Module) -> None:
    twin = copy.deepcopy(pruned).train()
    sum(value.square().mean() for value in twin(X)["feats"]).backward()
    for path in NARROWER:
        gradient = twin.get_parameter(f"{path}.conv.weight").grad
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0


def test_fused_layer_is_not_narrowed(model: nn.Module) -> None:
    """Its forward is not the one of its class."""
    fused: Any = copy.deepcopy(model)
    fused.fuse(verbose=False)
    plan = plan_without(fused, {"model.6.m.0"})
    pruned = fxprune.apply(fused, plan)
    assert pruned.get_submodule("model.6.cv2").conv.in_channels == 256  # type: ignore[union-attr]
    assert distance(outputs(pruned, X), outputs(as_they_were(fused, plan), X)) == 0


@pytest.mark.parametrize(
    ("kind", "narrowed"), [("Conv", 1), ("Conv2", 2), ("DWConv", 0), ("Moody", 0), ("replaced", 0)]
)
def test_narrowing_reaches_convolutions_of_known_layers_only(kind: str, narrowed: int) -> None:
    """`Conv2` reads its input by two, `DWConv` in groups, what `Moody` reads depends on its mode."""
    conv = pytest.importorskip("ultralytics.nn.modules.conv")

    class Moody(conv.Conv):  # type: ignore[name-defined,misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else super().forward(x) + x.sum()

    kinds = {"Moody": Moody, "replaced": conv.Conv}
    model = Joining([2, 3], [1, 2, 2], lambda n: (kinds.get(kind) or getattr(conv, kind))(n, 8))
    if kind == "replaced":
        model.reader.forward = MethodType(lambda self, x: self.bn(self.conv(x)) + x.sum(), model.reader)
    gm = traced(model.double().eval())
    assert narrow(gm) == bool(narrowed)
    assert sum(shape[1] == 5 for shape in gm.meta[NARROWED_WEIGHTS].values()) == narrowed
    x = pixels(2, 3, 7, 6).double()
    assert float((gm(x) - model(x)).detach().abs().max()) < 1e-12
