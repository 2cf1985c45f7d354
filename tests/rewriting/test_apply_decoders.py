"""Plans that remove whole layers which read a second value: it is no longer read, and the tokens pass through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Plan
from fxprune.rewriting.pruned_module import PassThrough
from tests.helpers.layers import Decoder, Layered, PostNormLayer, PreNormLayer, TwoStreamLayer
from tests.helpers.models import build, finite, labelled, pixels
from tests.helpers.removals import plan_for


class Second(nn.Module):
    """Returns its second argument."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return second


class First(nn.Module):
    """Returns its first argument, in the form of a decoder layer's result."""

    def forward(self, tokens: Tensor, **_: object) -> tuple[Tensor, None]:
        return tokens, None


class EagerLayered(Layered):
    """A model that is no graph: its layers are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(finite(x))


class EagerDecoder(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(finite(x))


CASES: dict[str, tuple[Callable[..., nn.Module], type[nn.Module], type[nn.Module]]] = {
    "post_norm": (Layered, PostNormLayer, Second),
    "pre_norm": (Decoder, PreNormLayer, First),
    "two_streams": (Layered, TwoStreamLayer, Second),
    "post_norm_eager": (EagerLayered, PostNormLayer, Second),
    "pre_norm_eager": (EagerDecoder, PreNormLayer, First),
}


def without(model: nn.Module, names: set[str], new: type[nn.Module]) -> nn.Module:
    expected = copy.deepcopy(model)
    for name in names:
        expected.set_submodule(name, new())
    return expected


@pytest.mark.parametrize("names", [{"layers.1"}, {"layers.0", "layers.2"}], ids=["one", "two"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_removed_layers_pass_their_tokens_through(case: str, names: set[str], tmp_path: Path) -> None:
    whole, kind, new = CASES[case]
    model, x = build(whole, layer=kind, layers=3), pixels(3, 3, 16, 24)
    plan = plan_for(fxprune.analyze(model, labelled(), criterion="l1"), names)
    plan.save(tmp_path / "plan.json")
    pruned = fxprune.apply(model, Plan.load(tmp_path / "plan.json"))
    torch.testing.assert_close(pruned(x), without(model, names, new)(x), rtol=0, atol=0)
    assert all(isinstance(pruned.get_submodule(name), PassThrough) for name in names)
    assert type(pruned) is type(model)


def test_all_layers_may_go_and_what_only_they_read_stays_in_the_model() -> None:
    model, x = build(Decoder, layer=PreNormLayer), pixels(2, 3, 16, 16)
    names = {"layers.0", "layers.1"}
    pruned = fxprune.apply(model, plan_for(fxprune.analyze(model, labelled(), criterion="l1"), names))
    torch.testing.assert_close(pruned(x), without(model, names, First)(x), rtol=0, atol=0)


@pytest.mark.parametrize("part", ["own", "cross", "mlp"])
def test_plan_removes_a_layer_or_parts_of_it(part: str) -> None:
    analysis = fxprune.analyze(build(Decoder, layer=PreNormLayer), labelled())
    regions = {region.name: region for region in analysis.regions}
    whole, inner = regions["layers.0"], regions[f"layers.0.{part}"]
    assert set(inner.layers) < set(whole.layers)  # without "cross", nothing reads the mask: it is a node of it
    assert inner.flops < whole.flops
    assert (whole.block, inner.block) == (True, False)
    for budget in (0.1, 0.3, 0.5):
        removed = {region.name for region in analysis.plan(budget).removed}
        assert not ("layers.0" in removed and removed & {f"layers.0.{name}" for name in ("own", "cross", "mlp")})


def test_costs_of_a_layer_are_all_of_its_own() -> None:
    model = build(Decoder, layer=PreNormLayer)
    regions = {region.name: region for region in fxprune.analyze(model, labelled(), criterion="l1").regions}
    own = sum(value.numel() for value in model.get_submodule("layers.0").parameters())
    assert regions["layers.0"].params == own


def test_score_of_a_layer_compares_its_result_with_its_tokens() -> None:
    model, batches = build(Layered, layer=PostNormLayer), labelled()
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[1], output))

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return network(batch[0]).square().sum(1).mean()

    def analyzed(criterion: str) -> tuple[Any, ...]:
        return fxprune.analyze(model, batches, loss=loss, criterion=criterion).regions

    scores = {
        criterion: {region.name: region.score for region in analyzed(criterion)}
        for criterion in ("grad_delta", "fisher", "fisher_mended")
    }
    model.get_submodule("layers.1").register_forward_hook(note)
    for batch in batches:
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
    products = [(output - tokens).detach() * output.grad for tokens, output in seen if output.grad is not None]
    change = torch.stack([product.abs().sum() for product in products]).sum().item() / len(batches)
    assert scores["grad_delta"]["layers.1"] == pytest.approx(change, rel=1e-4)
    assert scores["fisher"]["layers.1"] > 0
    assert scores["fisher_mended"]["layers.1"] > 0
