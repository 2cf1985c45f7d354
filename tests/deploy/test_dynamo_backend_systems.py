"""The backend "fxprune" on the six systems equals `fxprune.apply`, at inference and in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fxprune
from fxprune.deploy.dynamo_backend import fxprune_backend
from tests.helpers.cases import Case
from tests.helpers.comparisons import assert_alike, assert_trained_alike, trained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forget_compiled_code")]


def compiled_by_plan(model: torch.nn.Module, case: Case, inner: str) -> Any:
    options: Any = {"plan": case.plan, "inner": inner}
    return torch.compile(model, backend=fxprune_backend, options=options)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_backend_outputs_equal_those_of_apply(case: Case, inner: str) -> None:
    compiled, expected = compiled_by_plan(copy.deepcopy(case.model), case, inner), copy.deepcopy(case.pruned)(case.x)
    for _ in range(2):  # at the second call, regions that were not met are complained of
        assert_alike(compiled(case.x), expected)


def test_backend_gradients_equal_those_of_apply(case: Case) -> None:
    expected, twin = trained(case, fxprune.apply(case.model, case.plan)), copy.deepcopy(case.model)
    trained(case, twin, compiled_by_plan(twin, case, "aot_eager"))
    assert_trained_alike(twin, expected)
