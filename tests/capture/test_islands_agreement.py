"""A graph is trusted only if it agrees with its module in all that the module does, on every way it is called."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.capture.islands import capture_islands
from tests.helpers.models import Block, build, finite, pixels

X = pixels(2, 3, 16, 16)


class Around(nn.Module):
    """Stays eager around a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part, self.fc = nn.Conv2d(3, 8, 3, padding=1), part, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.part(self.stem(finite(x))).mean((2, 3)))


class Overwriting(nn.Module):
    """Begins with an in-place activation of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.block = nn.LeakyReLU(0.1, inplace=True), Block(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.act(x))


class Counting(nn.Module):
    """Adds up what it gets in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean()
        return self.block(x)


class Frozen(nn.Module):
    """Lets no gradient reach its first block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(8), Block(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


class Precise(nn.Module):
    """Returns float32 under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv = Block(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.block(x))
        return y.float() if torch.is_autocast_enabled("cpu") else y


class Optional(nn.Module):
    """Its graph is one with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.block(x)
        return y if mask is None else y * mask


def captured(model: nn.Module, *runs: Callable[[nn.Module], Any]) -> tuple[list[str], dict[str, str]]:
    """Names of the islands, and the reasons of what was refused."""
    islands, rejections = capture_islands(model, runs or [lambda network: network(X)], True)
    return [island.name for island in islands], {rejection.name: rejection.reason for rejection in rejections}


@pytest.mark.parametrize(
    ("part", "blocks", "words"),
    [
        (Overwriting, ["part.block"], "overwrites a tensor among its arguments"),
        (Counting, ["part.block"], "writes to the buffer 'part.seen'"),
        (Frozen, ["part.first", "part.second"], "its forward enters torch.no_grad"),
        (Precise, ["part.block", "part.conv"], "autocast.* other dtypes"),
    ],
)
def test_graph_that_does_not_do_all_that_its_module_does_is_refused(
    part: type[nn.Module], blocks: list[str], words: str
) -> None:
    names, reasons = captured(build(lambda: Around(part())))
    assert names == ["stem", "fc", *blocks] or names == ["stem", *blocks, "fc"]
    assert set(reasons) == {"<model>", "part"}
    assert re.search(words, reasons["part"])


def test_module_whose_graph_fits_one_of_its_calls_is_refused() -> None:
    class Masked(Around):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.fc(self.part(self.stem(finite(x)), mask).mean((2, 3)))

    mask, model = torch.ones(16, 16), build(lambda: Masked(Optional()))
    names, reasons = captured(model, lambda network: network(X, mask))
    assert "part" in names
    names, reasons = captured(model, lambda network: network(X, mask), lambda network: network(X))
    assert "part" not in names
    assert "part.block" in names
    assert "its graph fails on real values (TypeError" in reasons["part"]


def test_only_the_innermost_graph_that_disagrees_is_refused() -> None:
    class Outer(nn.Module):
        """Traceable around an opaque part that holds an unfaithful one."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = Block(8), Around(Overwriting())
            self.inner.stem = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(self.inner(self.first(x)))  # (N, 5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.outer = nn.Conv2d(3, 8, 3), Outer()

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.stem(finite(x)))

    names, reasons = captured(build(Model))
    assert names == ["stem", "outer", "outer.inner.stem", "outer.inner.fc", "outer.inner.part.block"]
    assert "overwrites" in reasons["outer.inner.part"]


def test_graph_without_an_effect_that_the_loss_reads_is_refused() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.features = Block(8), [torch.zeros(1)]

        def forward(self, x: Tensor) -> Tensor:
            self.features = [self.block(x)]
            return self.features[0]

    def loss(network: nn.Module) -> Tensor:
        part: Any = network.get_submodule("part")
        return network(X).sum() + part.features[0].square().sum()

    names, reasons = captured(build(lambda: Around(Remembering())), loss)
    assert "part" not in names
    assert {"stem", "part.block", "fc"} == set(names)
    assert "another result" in reasons["part"] or "gradients reach" in reasons["part"]


class Failing(nn.Module):
    """Its graph multiplies by a scale, which one of its calls does not give."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.block(x if scale is None else x * scale)


def test_graph_that_fails_is_refused_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names, reasons = captured(
        build(Failing), lambda network: network(X, scale=torch.ones(1)), lambda network: network(X)
    )
    assert names == ["block"]
    assert "its graph fails on real values (TypeError" in reasons["<model>"]
    assert capsys.readouterr() == ("", "")


def test_failure_outside_of_graphs_names_the_graph_that_causes_it() -> None:
    class Publishing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(8)

        def forward(self, x: Tensor) -> Tensor:
            self.size = x.shape[0]
            return self.block(x)

    class Reading(Around):
        def forward(self, x: Tensor) -> Tensor:
            y = self.part(self.stem(finite(x)))
            return self.fc(y.mean((2, 3))) / vars(self.part)["size"]

    names, reasons = captured(build(lambda: Reading(Publishing())))
    assert set(names) == {"stem", "part.block", "fc"}
    assert set(reasons) == {"<model>", "part"}
    assert "KeyError" in reasons["part"]


def test_model_that_is_not_reproducible_is_captured_without_blame() -> None:
    calls: list[int] = []

    class Wandering(nn.Module):
        """Gives other values at every call, for a reason that no seed controls."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Sequential(nn.Conv2d(3, 8, 3), Block(8)), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.fc(self.body(finite(x) + len(calls)).mean((2, 3)))

    names, reasons = captured(build(Wandering))
    assert names == ["body", "fc"]
    assert set(reasons) == {"<model>"}


def test_faithful_graphs_cost_two_runs_each_way() -> None:
    called: list[str] = []

    def run(network: nn.Module) -> Tensor:
        called.append("loss")
        return network(X)

    def predict(network: nn.Module) -> Tensor:
        called.append("predict")
        return network(X)

    names, _ = captured(build(lambda: Around(Block(8))), run, predict)
    assert names == ["stem", "part", "fc"]
    assert called == ["loss", "predict"] * 2


def test_capture_leaves_the_model_as_it_was() -> None:
    model = build(lambda: Around(nn.Sequential(Overwriting(), Counting(), Frozen()))).requires_grad_(False)
    modules, before = dict(model.named_modules()), {name: dict(vars(part)) for name, part in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    captured(model)
    assert dict(model.named_modules()) == modules
    assert all(vars(part).keys() == before[name].keys() for name, part in model.named_modules())
    assert all(vars(part)["training"] == before[name]["training"] for name, part in model.named_modules())
    assert model.get_submodule("part.0.act").inplace
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


def test_model_that_writes_to_its_weights_is_captured() -> None:
    class Clamping(Around):
        def forward(self, x: Tensor) -> Tensor:
            self.fc.weight.clamp_(-1, 1)  # allowed as long as the weight requires no gradient
            return super().forward(x)

    names, _ = captured(build(lambda: Clamping(Block(8))).requires_grad_(False))
    assert names == ["stem", "part", "fc"]
