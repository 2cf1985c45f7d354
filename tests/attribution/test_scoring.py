"""Scores do not depend on the contexts in which a model runs its blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune
from tests.helpers.models import Tiny, build, labelled


class Frozen(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.blocks(self.stem(x))
        return self.fc(x.mean((2, 3)))


class Checkpointed(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.blocks, self.stem(x), use_reentrant=False)
        return self.fc(x.mean((2, 3)))


def scores(kind: type[nn.Module]) -> dict[str, float]:
    return {region.name: region.score for region in fxprune.analyze(build(kind), labelled()).regions}


@pytest.mark.parametrize("kind", [Frozen, Checkpointed])
def test_blocks_in_a_context_have_the_scores_of_blocks_outside(kind: type[nn.Module]) -> None:
    assert scores(kind) == pytest.approx(scores(Tiny))


def test_analysis_of_a_frozen_backbone_leaves_it_frozen() -> None:
    model = build(Frozen)
    analysis = fxprune.analyze(model, labelled())
    pruned = fxprune.apply(model, analysis.plan(0.2)).train()
    pruned(labelled()[0][0]).sum().backward()
    assert {name for name, value in pruned.named_parameters() if value.grad is not None} == {"fc.weight", "fc.bias"}
    assert torch.is_grad_enabled()
