"""`run_lockstep`: several runs that wait for each other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fxprune.errors import ModelError
from fxprune.healing.reconstruction.lockstep import Rendezvous, run_lockstep


def test_run_lockstep_waits_for_all_and_answers_each() -> None:
    said: list[str] = []

    def run(name: str) -> Any:
        def work(meet: Rendezvous) -> None:
            for point in range(2):
                said.append(f"{name}{point}")
                said.append(f"{name} got {meet(point, name)}")

        return work

    def decide(point: int, values: dict[str, str]) -> dict[str, str]:
        said.append(f"{point}: {''.join(values.values())}")
        return {"a": "x"} if point == 0 else {"b": "y"}

    run_lockstep({"a": run("a"), "b": run("b")}, decide)
    assert said == [
        "a0", "b0", "0: ab", "a got x", "a1", "b got None", "b1", "1: ab", "a got None", "b got y",
    ]  # fmt: skip


def test_run_lockstep_does_not_wait_for_finished_runs() -> None:
    points: list[tuple[Any, list[str]]] = []

    def run(times: int) -> Any:
        def work(meet: Rendezvous) -> None:
            for point in range(times):
                meet(point, None)

        return work

    def decide(point: Any, values: dict[str, Any]) -> dict[str, Any]:
        points.append((point, list(values)))
        return {}

    run_lockstep({"short": run(1), "long": run(3)}, decide)
    assert points == [(0, ["short", "long"]), (1, ["long"]), (2, ["long"])]


@pytest.mark.parametrize("where", ["run", "decide"])
def test_run_lockstep_ends_all_runs_on_an_error(where: str) -> None:
    ended: list[str] = []

    def work(meet: Rendezvous) -> None:
        try:
            meet("here", 1)
        finally:
            ended.append("one")

    def wrong(meet: Rendezvous) -> None:
        if where == "run":
            raise ZeroDivisionError("in a run")
        work(meet)

    def decide(point: Any, values: Any) -> Any:
        raise ZeroDivisionError("in decide")

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError, match=f"in {'a run' if where == 'run' else 'decide'}"):
        run_lockstep({1: work, 2: wrong, 3: work}, decide)
    assert len(ended) == (1 if where == "run" else 3)  # the third had not begun when the second failed
    assert threading.active_count() == threads


def test_run_lockstep_refuses_runs_that_diverge() -> None:
    with pytest.raises(ModelError, match=r"left, right.*batches of one size"):
        run_lockstep({1: lambda meet: meet("left", 0), 2: lambda meet: meet("right", 0)}, lambda point, values: {})


def test_run_lockstep_keeps_the_grad_mode_outside() -> None:
    inside: list[bool] = []
    run_lockstep({1: lambda meet: inside.append(torch.is_grad_enabled())}, lambda point, values: {})
    assert inside == [False]
    assert torch.is_grad_enabled()
