"""Whole layers that read several values of the same shape, and contiguous stand-ins, in Dynamo's graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from tests.helpers.layers import Decoder, Layered, PostNormLayer, PreNormLayer, TwoStreamLayer
from tests.helpers.models import build, labelled, pixels
from tests.helpers.removals import plan_for

pytestmark = pytest.mark.usefixtures("forget_compiled_code")

MODELS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "post_norm": (Layered, PostNormLayer),
    "pre_norm": (Decoder, PreNormLayer),
    "two_streams": (Layered, TwoStreamLayer),
}


@pytest.mark.parametrize("names", [{"layers.0"}, {"layers.1"}, {"layers.0", "layers.1"}], ids=["first", "last", "both"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_backend_gives_readers_the_tokens_and_not_the_second_value(name: str, names: set[str]) -> None:
    whole, layer = MODELS[name]
    model, x = build(whole, layer=layer), pixels(2, 3, 16, 16)
    plan = plan_for(fxprune.analyze(model, labelled(), criterion="l1"), names)
    expected = fxprune.apply(model, plan)(x)
    assert not torch.equal(expected, model(x))
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, plan, inner="eager"))
    torch.testing.assert_close(compiled(x), expected)


class Inputs(nn.Module):
    """One layer of two inputs of the same shape: no operation computes either."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = TwoStreamLayer(4), nn.Linear(4, 5)

    def forward(self, other: Tensor, tokens: Tensor) -> Tensor:
        return self.fc(self.layer(other, tokens).mean(1))


def test_inputs_of_the_same_shape_are_not_confused_but_refused() -> None:
    model, pair = build(Inputs), (pixels(2, 7, 4), pixels(2, 7, 4, seed=1))
    analysis = fxprune.analyze(model, [pair], loss=lambda network, batch: network(*batch).square().mean())
    plan = plan_for(analysis, {"layer"})
    torch.testing.assert_close(fxprune.apply(model, plan)(*pair), model.fc(pair[1].mean(1)))  # type: ignore[operator]
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, plan, inner="eager"))
    with pytest.raises(BackendCompilerFailed, match="not one value of its exit's shape; prune with"):
        compiled(*pair)


class Tokens(nn.Module):
    """Linear layers on a permuted map, then a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)
        self.mixes = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for mix in self.mixes:
            x = mix(x)
        return self.head(x.view(-1, 6))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("names", [{"mixes.0"}, {"mixes.0", "mixes.1"}], ids=["one", "both"])
def test_backend_makes_stand_ins_contiguous(names: set[str], inner: str) -> None:
    model, x = build(Tokens), pixels(2, 3, 12, 10)
    analysis = fxprune.analyze(model, [x], loss=lambda network, batch: network(batch).square().mean())
    plan = plan_for(analysis, names)
    assert any(region.contiguous for region in plan.removed)
    compiled = torch.compile(model, backend=fxprune.pruning_backend(model, plan, inner=inner))
    torch.testing.assert_close(compiled(x), fxprune.apply(model, plan)(x))
