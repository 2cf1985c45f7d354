"""Plans for transformers, whose graphs have constant arguments and arguments that depend on the mode."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Plan, PlanError
from tests.helpers.models import Attention, Encoder, build, labelled, pixels
from tests.helpers.removals import plan_for


class Zero(nn.Module):
    """In the place of an attention whose branch is gone."""

    def forward(self, tokens: Tensor, **_: object) -> Tensor:
        return torch.zeros_like(tokens)


class PassOn(nn.Module):
    """In the place of a layer that is gone."""

    def forward(self, tokens: Tensor, **_: object) -> Tensor:
        return tokens


SWAPS = {"layers.1": PassOn, "layers.0.attention": Zero}


def loss_with(**options: object) -> object:
    return lambda model, batch: model(batch[0], **options).square().mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(SWAPS))
def test_apply_of_a_saved_plan_follows_mode_and_precision(
    name: str, dtype: torch.dtype, training: bool, tmp_path: Path
) -> None:
    model = build(Encoder).to(dtype)
    plan = plan_for(fxprune.analyze(model, labelled(), criterion="l1"), {name})
    plan.save(tmp_path / "plan.json")
    pruned = fxprune.apply(model, Plan.load(tmp_path / "plan.json")).train(training)
    expected = copy.deepcopy(model).train(training)
    expected.set_submodule(name, SWAPS[name]())
    outputs = []
    for network in (pruned, expected):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.rand(1)
            outputs.append(network(pixels(2, 3, 16, 16).to(dtype)))
    if training and name == "layers.0.attention":  # the dropout of zeros takes random numbers too
        assert outputs[0].shape == outputs[1].shape
    else:
        torch.testing.assert_close(*outputs)


def test_plan_says_which_arguments_are_constants_and_apply_needs_them() -> None:
    model = build(Encoder)
    analysis = fxprune.analyze(model, labelled(), loss=loss_with(biased=False), criterion="l1")  # type: ignore[arg-type]
    plan = plan_for(analysis, {"layers.1"})
    (island,) = plan.islands
    assert dict(island.constants) == {"biased": False}
    assert fxprune.apply(model, plan)(pixels(2, 3, 16, 16), biased=False).shape == (2, 5)
    data = plan.to_dict()
    data["islands"][0]["constants"] = {}
    with pytest.raises(PlanError, match="structure differs"):
        fxprune.apply(model, Plan.from_dict(data))


def test_part_with_an_optional_argument_is_its_own_graph() -> None:
    class Deciding(Encoder):
        def forward(self, x: Tensor, **options: object) -> Tensor:
            return super().forward(x if float(x.sum()) > -1e9 else -x, **options)

    analysis = fxprune.analyze(build(Deciding), labelled(), criterion="l1")
    assert {island.name: dict(island.constants) for island in analysis.islands}["layers.0"] == {}
    assert {"layers.0", "layers.0.attention", "layers.0.mlp"} <= {region.name for region in analysis.regions}
    assert isinstance(build(Deciding).get_submodule("layers.0.attention"), Attention)
