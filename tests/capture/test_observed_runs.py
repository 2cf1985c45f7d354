"""Digests of runs: what they see, and when two are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture.observed_runs import UNKNOWN, RunRecord, Watch, digest, equal, observe, reproducible
from tests.helpers.models import Block, build, pixels, tiny

X = pixels(2, 3, 16, 16)


@dataclass
class Output:
    logits: Tensor
    name: str


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(2) + 1e-7, True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2, 1), torch.ones(2), False),
        ([torch.ones(2)], (torch.ones(2),), False),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, False),
        ([torch.ones(2), None], [torch.ones(2), 1], False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (Output(torch.ones(2), "a"), Output(torch.ones(2), "a"), True),
        (Output(torch.ones(2), "a"), Output(torch.zeros(2), "a"), False),
        (Output(torch.ones(2), "a"), torch.ones(2), False),
    ],
)
def test_digests_are_equal_if_the_values_are(first: Any, second: Any, same: bool) -> None:
    assert equal(digest(first), digest(second)) == same


def test_unknown_equals_everything() -> None:
    assert equal((1.0, UNKNOWN), (1.0, digest(torch.ones(2))))


class Changing(nn.Module):
    """Overwrites its second argument, and a slice of a list's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, y: Tensor, *, rest: list[Tensor]) -> Tensor:
        y.add_(1)
        rest[1][:, :1] *= 0
        return self.conv(x)


def test_observe_sees_overwritten_arguments() -> None:
    model = nn.Sequential(Changing())
    record = observe(
        model, lambda network: network.get_submodule("0")(X, X.clone(), rest=[X, X.clone()]), Watch(("0", "0.conv"))
    )
    assert [position for position, _ in record.calls["0"][0].overwritten] == [1, 3]
    assert record.calls["0.conv"][0].overwritten == []
    assert record.calls["0.conv"][0].within == ("0",)
    assert record.calls["0"][0].inputs is None


@pytest.mark.parametrize("stop", ["nothing", "no_grad", "detach"])
def test_observe_sees_which_weights_gradients_reach(stop: str) -> None:
    class Stopping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), Block(8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(stop != "no_grad"):
                x = self.stem(x)
            return self.head(x.detach() if stop == "detach" else x)

    model = build(Stopping).requires_grad_(False)
    record = observe(model, lambda network: {"loss": network(X).sum()}, Watch((), gradients=True))
    head = {f"head.{name}" for name, _ in Block(8).named_parameters()}
    assert record.reached == head | ({"stem.weight", "stem.bias"} if stop == "nothing" else set())
    assert not any(weight.requires_grad for weight in model.parameters())
    assert observe(model, lambda network: network(X), Watch(())).reached == frozenset()


def test_observe_closely_leaves_out_weights_with_a_gradient_of_zero() -> None:
    model = build(lambda: nn.ModuleDict({"used": nn.Linear(3, 2), "masked": nn.Linear(3, 2)}))
    kept = model.get_parameter("used.weight").grad = torch.ones(2, 3)

    def run(network: nn.Module) -> Tensor:
        used, masked = (network.get_submodule(name)(torch.ones(1, 3)) for name in ("used", "masked"))
        return used.sum() + 0 * masked.sum()

    names = {name for name, _ in model.named_parameters()}
    assert observe(model, run, Watch((), gradients=True)).reached == names
    assert observe(model, run, Watch((), gradients=True, closely=True)).reached == {"used.weight", "used.bias"}
    assert model.get_parameter("used.weight").grad is kept
    assert model.get_parameter("masked.weight").grad is None


def test_observe_begins_every_run_alike() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm2d(3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(x + torch.randn(()) + self.calls)

    model, state = Noisy(), torch.get_rng_state()
    first, second = (observe(model, lambda network: network(X), Watch(("norm",), closely=True)) for _ in range(2))
    assert equal(first.calls["norm"][0].inputs, second.calls["norm"][0].inputs)
    assert equal(first.result, second.result)
    assert equal(first.buffers, second.buffers)
    assert not equal(first.buffers["norm.running_mean"], digest(torch.zeros(3)))
    assert model.calls == 0
    assert not model.norm.running_mean.any()  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), state)


def test_observe_keeps_the_error_and_the_calls_that_did_not_end() -> None:
    def run(network: nn.Module) -> Tensor:
        network(X)
        return network(X[:, :2])

    record = observe(tiny(), run, Watch(("", "stem", "blocks"), closely=True))
    assert isinstance(record.failure, RuntimeError)
    assert [call.name for call in record.begun] == ["", "stem"]
    assert equal(record.begun[1].inputs, digest(((X[:, :2],), {})))
    assert {name: len(calls) for name, calls in record.calls.items()} == {"": 1, "stem": 1, "blocks": 1}


def test_observe_survives_errors_that_the_model_catches() -> None:
    class Trying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.conv(x[:, :2])
            except RuntimeError:
                return self.conv(x)
            raise AssertionError

    record = observe(Trying(), lambda network: network(X), Watch(("", "conv")))
    assert record.failure is None
    assert [len(record.calls[name]) for name in ("", "conv")] == [1, 1]
    assert record.begun == []


def test_what_two_runs_do_not_share_is_unknown() -> None:
    model = tiny()
    first = observe(model, lambda network: network(X), Watch(("stem", "fc")))
    second = observe(model, lambda network: network(X + 1), Watch(("stem",), closely=True))
    common = reproducible(first, second)
    assert common.result is UNKNOWN
    assert common.calls["stem"][0].output is UNKNOWN
    assert common.calls["stem"][0].inputs == second.calls["stem"][0].inputs
    assert equal(common.calls["fc"][0].output, first.calls["fc"][0].output)
    assert "stem" not in reproducible(first, RunRecord(calls={"stem": []})).calls
