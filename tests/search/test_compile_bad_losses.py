"""Invalid losses, and runs that are interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import BatchError, LossError, SettingError
from tests.helpers.hostile import assert_refused, assert_unchanged, removed
from tests.helpers.models import Tiny, labelled, pixels, squared, tiny

# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_loss_that_is_not_finite_is_refused(value: float, shown: str, where: int) -> None:
    model, batches = tiny(), [(*batch, 0.0) for batch in labelled()]
    batches[where] = (*batches[where][:2], value)
    with assert_refused(model, LossError, f"^batch {where}: the loss is {shown};"):
        fxprune.compile(model, batches, 0.1, loss=lambda model, batch: squared(model, batch) + batch[2])


@pytest.mark.parametrize("where", [0, 1])
def test_gradient_that_is_not_finite_is_refused(where: int) -> None:
    model, batches = tiny(), [(*batch, i == where) for i, batch in enumerate(labelled())]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = squared(model, batch)
        return value + (value * 0).sqrt() if batch[2] else value  # finite, but its slope at 0 is not

    with assert_refused(model, LossError, f"^batch {where}: .*gradient at '.+' is NaN"):
        fxprune.compile(model, batches, 0.1, loss=loss)


def _slope(model: nn.Module, batch: Any) -> Tensor:
    return squared(model, batch).detach() + torch.zeros((), requires_grad=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: torch.tensor(1.0),
        lambda model, batch: torch.zeros((), requires_grad=True) + 1,
        lambda model, batch: squared(model, batch).detach(),
        _slope,
        lambda model, batch: squared(model, batch) * 0,
        lambda model, batch: next(model.parameters()).square().mean(),
    ],
    ids=["constant", "constant with gradient", "detached", "detached plus a leaf", "times zero", "weight decay"],
)
def test_loss_that_does_not_depend_on_the_model_is_refused(loss: Any) -> None:
    model = tiny()
    with assert_refused(model, LossError, "does not depend on"):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


@pytest.mark.parametrize("criterion", ["fisher", "grad_delta", "grad_act"])
def test_region_with_zero_gradient_is_not_taken_for_unimportant(criterion: str) -> None:
    """A loss may mask a part of the model on every batch, as detectors do with a level that no box falls on."""

    class Masked(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            seen, unseen = self.blocks[1](self.blocks[0](stem)), self.blocks[3](self.blocks[2](stem))
            return torch.cat([self.fc(seen.mean((2, 3))), self.fc(unseen.mean((2, 3)))], 1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Masked().eval()
    with assert_unchanged(model):
        analysis = fxprune.analyze(
            model,
            labelled(),
            criterion=criterion,
            loss=lambda model, batch: (model(batch[0]).square() * torch.tensor([1.0, 0.0]).repeat_interleave(5)).mean(),
        )
    assert {"blocks.0", "blocks.1"} <= {region.name for region in analysis.regions}
    assert all(region.score > 0 for region in analysis.regions)
    refused = {rejection.name for rejection in analysis.rejections if "no gradient reached it" in rejection.reason}
    assert {"blocks.2", "blocks.3"} <= refused


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"^batch 0: .*\(2, 5\); .*scalar"),
        (lambda model, batch: float(squared(model, batch)), r"^batch 0: .*float, not a scalar"),
        (lambda model, batch: None, r"^batch 0: .*NoneType, not a scalar"),
        (lambda model, batch: {"loss": squared(model, batch)}, r"^batch 0: .*dict, not a scalar"),
    ],
)
def test_loss_that_is_no_scalar_is_refused(loss: Any, message: str) -> None:
    model = tiny()
    with assert_refused(model, LossError, message):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


def test_loss_of_one_element_is_accepted() -> None:
    assert removed(fxprune.compile(tiny(), labelled(), 0.1, loss=lambda m, b: squared(m, b).reshape(1))) == removed(
        fxprune.compile(tiny(), labelled(), 0.1, loss=squared)
    )


@pytest.mark.parametrize("loss", ["cross_entropy", 3, pixels(1)])
def test_loss_that_is_not_callable_is_refused(loss: Any) -> None:
    model = tiny()
    with assert_refused(model, SettingError, rf"callable\(model, batch\) .*got {type(loss).__name__}"):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


def test_failing_loss_names_its_batch_and_error() -> None:
    model = tiny()
    with assert_refused(model, BatchError, "^batch 0: .*KeyError: 'img'"):
        fxprune.compile(model, labelled(), 0.1, loss=lambda model, batch: dict[str, Tensor]()["img"])


def test_exception_of_the_caller_passes_through_the_loss() -> None:
    class Stop(Exception):
        pass

    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise Stop

    model = tiny()
    with assert_unchanged(model), pytest.raises(Stop):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


# Interruptions -------------------------------------------------------------------------------------------------------


def halfway() -> nn.Module:
    """A model in a state that defaults would not restore: mixed modes, some weights frozen, hooks."""
    model = tiny().train()
    model.get_submodule("blocks.1").eval()
    model.get_submodule("blocks.2").requires_grad_(False)
    model.get_submodule("stem").register_forward_hook(lambda *given: None)
    return model


def test_interrupt_in_the_loader_leaves_the_model_unchanged() -> None:
    model = halfway()

    def batches() -> Iterator[Any]:
        yield labelled()[0]
        torch.rand(1)
        raise KeyboardInterrupt

    with assert_unchanged(model), pytest.raises(KeyboardInterrupt):
        fxprune.compile(model, batches(), 0.1)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_interrupt_in_the_loss_leaves_the_model_unchanged(call: int) -> None:
    """Call by call: while the model is observed, held to its graphs, counted, scored, and fitted."""
    model, calls = halfway(), [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(1)
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return squared(model, batch)

    with assert_unchanged(model), pytest.raises(KeyboardInterrupt):
        fxprune.compile(model, labelled(), 0.1, loss=loss, criterion="fisher_mended")
    assert calls == [call]
    with assert_unchanged(model):
        assert len(fxprune.analyze(model, labelled(), loss=squared).regions) >= 4


def test_compile_leaves_random_state_unchanged() -> None:
    model = halfway()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squared(model, batch) + 0 * torch.rand(())

    with assert_unchanged(model):
        fxprune.compile(model, labelled(), 0.1, loss=loss, criterion="random")
