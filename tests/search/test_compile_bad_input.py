"""Invalid budgets, settings and loaders: a clear error for each, and the model is unchanged."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fxprune
from fxprune import BatchError, BudgetError, SettingError
from tests.helpers.hostile import Unread, assert_refused, assert_unchanged, removed
from tests.helpers.models import labelled, pixels, tiny

# The helper itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        lambda model: model.train(),
        lambda model: model.stem.weight.data.mul_(2),
        lambda model: model.stem.requires_grad_(False),
        lambda model: model.blocks[0].norm.running_mean.add_(1),
        lambda model: model.blocks[0].register_forward_hook(print),
        lambda model: setattr(model.blocks[0].act, "inplace", False),
        lambda model: setattr(model, "fxprune_plans", []),
        lambda model: model(pixels(1, 3, 16, 16)).sum().backward(),
        lambda model: torch.rand(1),
        lambda model: torch.nn.init.zeros_(model.fc.weight),
        lambda model: setattr(model, "fc", copy.deepcopy(model.fc)),
    ],
)
def test_assert_unchanged_sees_every_change(harm: Callable[[Any], Any]) -> None:
    model = tiny()
    with torch.random.fork_rng(), pytest.raises(AssertionError), assert_unchanged(model):
        harm(model)


# Budgets and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget", [0, 1, 0.0, 1.0, -0.1, 1.5, 10, float("nan"), float("inf"), "0.1", True, None, [0.1]]
)
def test_budget_that_is_no_fraction_is_refused(budget: Any) -> None:
    model = tiny()
    with assert_refused(model, BudgetError, rf"between 0 and 1 .*got {re.escape(repr(budget))}"):
        fxprune.compile(model, Unread(), budget)


@pytest.mark.parametrize("budget", [np.float64(0.1), np.float32(0.1)])
def test_numpy_budget_is_accepted(budget: Any) -> None:
    assert len(removed(fxprune.compile(tiny(), labelled(), budget))) == 1


def test_infeasible_budget_error_says_how_much_could_go() -> None:
    model = tiny()
    with assert_unchanged(model), pytest.raises(BudgetError, match="at most") as caught:
        fxprune.compile(model, labelled(), 0.999)
    share = re.search(r"([\d.]+)% at most; .*less than (0\.\d+)", str(caught.value))
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * float(share[2]), abs=0.11)
    assert len(removed(fxprune.compile(model, labelled(), float(share[2])))) == 4


@pytest.mark.parametrize("criterion", ["gradient", "", None, 3, ["l1"]])
def test_unknown_criterion_is_refused(criterion: Any) -> None:
    model = tiny()
    with assert_refused(model, SettingError, "criterion .*known: .*fisher.*l1.*callable"):
        fxprune.compile(model, Unread(), 0.1, criterion=criterion)


@pytest.mark.parametrize("cost", ["watts", None, ["flops"]])
def test_unknown_cost_is_refused(cost: Any) -> None:
    model = tiny()
    with assert_refused(model, SettingError, "cost .*known: .*flops.*params.*blocks"):
        fxprune.compile(model, labelled(), 0.1, cost=cost)


def test_unknown_cost_is_refused_before_any_work() -> None:
    with pytest.raises(SettingError, match="cost 'watts' is not known"):
        fxprune.compile(tiny(), Unread(), 0.1, cost="watts")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf"), None, "low"])
def test_criterion_without_finite_number_is_refused(score: Any) -> None:
    model = tiny()
    with assert_refused(model, SettingError, r"blocks\.0.* finite"):
        fxprune.compile(model, labelled(), 0.1, criterion=lambda region, modules: score)


def test_error_in_a_custom_criterion_is_passed_on() -> None:
    model = tiny()

    def criterion(region: Any, modules: Any) -> float:
        raise ZeroDivisionError(region.name)

    with assert_unchanged(model), pytest.raises(ZeroDivisionError, match=r"blocks\.0"):
        fxprune.compile(model, labelled(), 0.1, criterion=criterion)


# Loaders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], (), iter(()), (batch for batch in list[Any]())])
def test_loader_without_batches_is_refused(empty: Any) -> None:
    model = tiny()
    with assert_refused(model, BatchError, "calib_loader .*no batch"):
        fxprune.compile(model, empty, 0.1)


@pytest.mark.parametrize("loader", [pixels(2, 3, 16, 16), {"img": pixels(2, 3, 16, 16)}, "coco.yaml", b"", None, 3])
def test_object_that_is_no_loader_is_refused(loader: Any) -> None:
    model = tiny()
    with assert_refused(model, BatchError, f"calib_loader .*got {type(loader).__name__}"):
        fxprune.compile(model, loader, 0.1)


@pytest.mark.parametrize("criterion", ["fisher", "grad_delta", "fisher_mended"])
def test_generator_is_read_once(criterion: str) -> None:
    model, yields = tiny(), [0]

    def batches() -> Iterator[Any]:
        for batch in labelled(batches=3):
            yields[0] += 1
            yield batch

    generator = batches()
    with assert_unchanged(model):
        pruned = fxprune.compile(model, generator, 0.1, criterion=criterion)
    assert yields == [3]
    assert next(generator, None) is None
    report = fxprune.report(pruned)
    assert (report.settings["batches"], report.settings["images"]) == (3, 6)
    assert removed(pruned) == removed(fxprune.compile(model, labelled(batches=3), 0.1, criterion=criterion))


def test_list_loader_is_read_once() -> None:
    reads = [0]

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            reads[0] += 1
            return iter(labelled())

    fxprune.analyze(tiny(), Loader(), criterion="fisher_mended")
    assert reads == [1]


@pytest.mark.parametrize("where", [0, 1])
def test_none_among_the_batches_is_refused(where: int) -> None:
    model, batches = tiny(), list[Any](labelled())
    batches.insert(where, None)
    with assert_refused(model, BatchError, rf"^batch {where}: .*None"):
        fxprune.compile(model, batches, 0.1)


def test_error_in_the_loader_is_passed_on() -> None:
    model = tiny()

    def batches() -> Iterator[Any]:
        yield labelled()[0]
        raise OSError("image 17 is truncated")

    with assert_unchanged(model), pytest.raises(OSError, match="image 17 is truncated"):
        fxprune.compile(model, batches(), 0.1)
