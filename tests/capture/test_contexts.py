"""Contexts that are entered show in the states, also those that change nothing in torch."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from fxprune.capture.contexts import context_states, watch_autocasts


def quiet_cuda() -> torch.autocast:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.autocast("cuda", enabled=False)


CONTEXTS: dict[str, Any] = {
    "torch.no_grad": torch.no_grad,
    "torch.inference_mode": torch.inference_mode,
    "torch.autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "torch.autocast, switched off": lambda: torch.autocast("cpu", enabled=False),
    "torch.autocast for another device": quiet_cuda,
    "hooks on saved tensors": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("name", sorted(CONTEXTS))
def test_context_states_differ_inside_a_context_and_name_it(name: str) -> None:
    with torch.enable_grad(), watch_autocasts() as entered:
        before = context_states(entered)
        context: AbstractContextManager[Any] = CONTEXTS[name]()
        with context:
            inside = context_states(entered)
        after = context_states(entered)
    changed = [kind for kind, state in inside.items() if state != before[kind]]
    assert any(name.partition(",")[0].partition(" for")[0] in kind for kind in changed)
    assert after == before


def test_watch_autocasts_restores_the_class_after_an_error() -> None:
    enter = torch.autocast.__enter__
    with pytest.raises(RuntimeError, match="inside"), watch_autocasts():
        raise RuntimeError("inside")
    assert torch.autocast.__enter__ is enter
