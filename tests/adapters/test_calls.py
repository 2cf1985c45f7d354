"""A model that is ready to be run: a copy of its own, everything else left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.adapters import classifier
from fxprune.adapters.calls import AdaptedModel, isolated_run
from fxprune.errors import BatchError
from tests.helpers.models import labelled, pixels, tiny


def test_adapted_model_works_on_a_copy() -> None:
    model = tiny()
    adapted = AdaptedModel.copy_of(model, classifier.ADAPTER, seed=3)
    assert adapted.module is not model
    assert adapted.seed == 3
    other = adapted.copy_version(tiny(seed=1))
    assert other.adapter is adapted.adapter
    assert not any(weight.requires_grad for weight in adapted.module.parameters())


def test_reading_a_batch_notes_whose_targets_it_has() -> None:
    adapted = AdaptedModel.copy_of(tiny(), classifier.ADAPTER)
    given = adapted.read(0, labelled()[0])
    assert not given.own_targets
    own = adapted.read(1, pixels(2, 3, 16, 16))
    assert own.own_targets
    assert torch.equal(own.targets, adapted.predict(own).argmax(1))
    assert adapted.normalize(1, pixels(2, 3, 16, 16)).targets is None
    with pytest.raises(BatchError, match="batch 4: got None"):
        adapted.read(4, None)


@pytest.mark.parametrize("grad", [True, False])
def test_running_restores_modes_randomness_and_gradients(grad: bool) -> None:
    adapted = AdaptedModel.copy_of(tiny(), classifier.ADAPTER)
    adapted.module.train()
    modes = [part.training for part in adapted.module.modules()]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with torch.inference_mode(), adapted.running(grad):
        assert torch.is_grad_enabled() is grad
        assert not torch.is_inference_mode_enabled()
        adapted.predict(adapted.read(0, labelled()[0]))
        torch.rand(7)
    assert torch.equal(torch.rand(3), wanted)
    assert [part.training for part in adapted.module.modules()] == modes


def test_isolated_run_restores_randomness_after_an_error() -> None:
    layer = nn.Linear(1, 1)

    def fail() -> None:
        with isolated_run(layer, grad=False):
            torch.rand(7)
            raise ValueError("stop")

    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="stop"):
        fail()
    assert torch.equal(torch.rand(3), wanted)
