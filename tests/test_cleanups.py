"""What a bypass leaves behind is removed, and nothing else: the same values before and after, on tiny graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torchvision.ops import StochasticDepth

from fxprune.capture import trace_island
from fxprune.channels import channels_of
from fxprune.passes.cleanup import remove_dead_code
from fxprune.passes.idling import skip_idle
from fxprune.passes.narrowing import NARROWED, join_parts, narrow_readers

EXACT = 1e-12
"""What rounding may change in float64, of values around 1."""


def traced(model: nn.Module) -> Any:
    found = trace_island(model, frozenset(), exactly=True)
    assert found is not None
    return found[0]


def narrow(gm: fx.GraphModule, model: nn.Module | None = None) -> bool:
    return narrow_readers(gm, channels_of(gm), model).modified


def distance(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    assert first.dtype == second.dtype
    return float((first - second).detach().abs().max())


def image(channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, channels, 7, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


# One value twice -----------------------------------------------------------------------------------------------------


class Joining(nn.Module):
    """Values of the given widths, concatenated as `order` says (from 1) and read by `reader`.

    Every other one is the right half of a wider one. Where a number is negative, the value is added to itself.
    """

    def __init__(self, widths: Sequence[int], order: Sequence[int], reader: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.order = tuple(order)
        layers = [nn.Conv2d(3, width * (1 + index % 2), 1) for index, width in enumerate(widths)]
        self.layers = nn.ModuleList(layers)
        self.reader: Any = reader(sum(widths[abs(number) - 1] for number in order))

    def values(self, x: Tensor) -> Any:
        return [
            layer(x).chunk(2, 1)[1] if index % 2 else functional.relu(layer(x))
            for index, layer in enumerate(self.layers)
        ]

    def forward(self, x: Tensor) -> Tensor:
        values = self.values(x)
        joined = [values[n - 1] if n > 0 else values[-n - 1] + values[-n - 1] for n in self.order]
        return self.reader(torch.cat(joined, 1))


def plain(channels: int) -> nn.Module:
    return nn.Conv2d(channels, 4, 3, padding=1)


widths = st.lists(st.integers(1, 5), min_size=1, max_size=4)
kinds: dict[str, Callable[..., nn.Module]] = {"conv": nn.Conv2d, "transposed": nn.ConvTranspose2d}


@settings(max_examples=60, deadline=None)
@given(widths=widths, kind=st.sampled_from(sorted(kinds)), bias=st.booleans(), stride=st.integers(1, 2), data=st.data())
def test_random_concatenations_give_the_same(
    widths: list[int], kind: str, bias: bool, stride: int, data: st.DataObject
) -> None:
    torch.manual_seed(sum(widths))
    numbers = st.sampled_from([sign * number for number in range(1, len(widths) + 1) for sign in (1, -1)])
    order = data.draw(st.lists(numbers, min_size=1, max_size=7))
    padding = data.draw(st.sampled_from([0, 1]))
    model = Joining(widths, order, lambda n: kinds[kind](n, 3, 3, stride, padding, bias=bias)).double().eval()
    kept = copy.deepcopy(model.state_dict())
    gm = traced(model)
    modified = narrow(gm)
    assert modified == (len({abs(number) for number in order}) < len(order) or min(order) < 0)
    assert distance(gm(image()), model(image())) < EXACT
    left = sum(widths[number - 1] for number in {abs(number) for number in order})
    assert gm.reader.in_channels == left
    assert gm.reader.weight.shape[0 if kind == "transposed" else 1] == left
    assert type(gm.reader) is kinds[kind]
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_the_sums_are_the_weights() -> None:
    model = Joining([2, 3], [1, 2, 1, -2], lambda n: nn.Conv2d(n, 4, 1, bias=False)).double()
    gm = traced(model)
    assert narrow(gm)
    (key, shape), *others = gm.meta[NARROWED].items()
    assert (key, shape, others) == ("reader.weight", (4, 5, 1, 1), [])
    first, second, third, fourth = model.reader.weight.split([2, 3, 2, 3], 1)
    assert torch.equal(gm.reader.weight, torch.cat([first + third, second + 2 * fourth], 1))


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
def test_padding_and_dilation_make_no_difference(padding: Any) -> None:
    def reader(channels: int) -> nn.Module:
        return nn.Conv2d(channels, 4, 3, padding=2, dilation=2, padding_mode=padding)

    model = Joining([2, 3], [1, 2, 2], reader).double()
    gm = traced(model)
    assert narrow(gm)
    assert distance(gm(image()), model(image())) < EXACT


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_rounds_once(dtype: torch.dtype, exact: float) -> None:
    model = Joining([4, 6], [1, 2, 2, 2], plain).to(dtype)
    gm = traced(model)
    assert narrow(gm)
    weight = model.reader.weight.detach().double()
    sums = torch.cat([weight[:, :4], weight[:, 4:10] + weight[:, 10:16] + weight[:, 16:]], 1)
    assert gm.reader.weight.dtype == dtype
    assert torch.equal(gm.reader.weight, sums.to(dtype)) or dtype is torch.float32
    x = image(dtype=dtype)
    assert distance(gm(x), model(x)) < exact


def test_memory_format_mode_and_gradients_are_kept() -> None:
    model = Joining([2, 3], [1, 2, 2], plain).double().to(memory_format=torch.channels_last)
    model.reader.weight.requires_grad_(False)
    gm = traced(model.eval())
    assert narrow(gm)
    assert gm.reader.weight.stride() == (5 * 9, 1, 3 * 5, 5)
    assert not gm.reader.weight.requires_grad
    assert gm.reader.bias.requires_grad
    assert not gm.reader.training
    x = image().to(memory_format=torch.channels_last)
    assert distance(gm(x), model(x)) < EXACT
    assert gm(x).stride() == model(x).stride()


def test_a_narrower_layer_trains_and_exports() -> None:
    gm = traced(Joining([2, 3], [1, 2, 2], plain).double())
    assert narrow(gm)
    expected = gm(image())
    exported = torch.export.export(gm.eval(), (image(),)).module()(image())
    assert distance(exported, expected) < EXACT
    gm.train()(image()).square().sum().backward()
    assert gm.reader.weight.grad.shape == gm.reader.weight.shape
    assert float(gm.reader.weight.grad.abs().sum()) > 0


def test_several_readers_all_become_narrower() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = plain(9), nn.Conv2d(9, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    class Both(Joining):
        def forward(self, x: Tensor) -> Tensor:
            first, second = self.values(x)
            joined = torch.cat([first, second, second, first], 1)
            return self.reader.one(joined) + self.reader.two(joined)

    model = Both([2, 3], [1, 2, 2, 1], lambda n: Two()).double()
    model.reader.one, model.reader.two = plain(10).double(), nn.Conv2d(10, 4, 1).double()
    gm = traced(model)
    assert narrow(gm)
    assert gm.reader.one.in_channels == gm.reader.two.in_channels == 5
    assert distance(gm(image()), model(image())) < EXACT


# Left alone ----------------------------------------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    """Not linear in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight / self.weight.abs().sum((1, 2, 3), keepdim=True)
        return functional.conv2d(input, weight, self.bias, padding=1)


class Calling(Joining):
    """Reads the concatenation in a way of its own."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], reader: Callable[[int], nn.Module] = plain) -> None:
        super().__init__([2, 3], [1, 2, 2], reader)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.values(x)
        return self.read(self.reader, torch.cat([first, second, second], 1))


class Twice(Joining):
    """Reads two concatenations by one layer; they hold the same values, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.values(x)
        return self.reader(torch.cat([first, second, second], 1)) + self.reader(torch.cat([second, second, first], 1))


def hooked(channels: int) -> nn.Module:
    """The older way to normalize a weight: before every call, from two others."""
    return torch.nn.utils.weight_norm(plain(channels))


ALONE: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: Joining([2, 2], [1, 2, 2, 2], lambda n: nn.Conv2d(n, 4, 3, groups=2)),
    "depthwise": lambda: Joining([2, 2], [1, 2, 2, 2], lambda n: nn.Conv2d(n, n, 3, groups=n)),
    "derived": lambda: Joining([2, 3], [1, 2, 2], lambda n: Standardized(n, 4, 3)),
    "parametrized": lambda: Joining([2, 3], [1, 2, 2], lambda n: parametrizations.weight_norm(plain(n))),
    "normalized": lambda: Joining([2, 3], [1, 2, 2], hooked),
    "linear": lambda: Calling(lambda read, x: read(x.flatten(1)), lambda n: nn.Linear(n * 42, 4)),
    "norm": lambda: Calling(lambda read, x: read(x), lambda n: nn.Sequential(nn.BatchNorm2d(n), plain(n))),
    "called twice": lambda: Twice([2, 3], [1, 2, 2], plain),
    "read elsewhere": lambda: Calling(lambda read, x: read(x) + x.sum()),
    "given": lambda: Calling(lambda read, x: torch.cat([read(x), x], 1)),
    "no value twice": lambda: Joining([2, 3], [2, 1], plain),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ALONE)
def test_left_alone(name: str) -> None:
    model = ALONE[name]().double().eval()
    gm = traced(model)
    before = gm.code
    assert not narrow(gm)
    assert gm.meta[NARROWED] == {}
    assert gm.code == before
    assert torch.equal(gm(image()), model(image()))


def test_a_layer_whose_inside_is_not_known_is_left_alone() -> None:
    model = Joining([2, 3], [1, 2, 2], lambda n: Standardized(n, 4, 3)).double()
    found = trace_island(model, frozenset({"reader"}), exactly=True)
    assert found is not None
    assert [node.op for node in found[0].graph.nodes][-2] == "call_module"
    assert not narrow(found[0])
    assert torch.equal(found[0](image()), model(image()))


def test_a_concatenation_of_rows_is_none_of_channels() -> None:
    class Rows(Joining):
        dim = 2

        def forward(self, x: Tensor) -> Tensor:
            (value,) = self.values(x)
            return self.reader(torch.cat([value, value], self.dim))

    for dim, x in ((2, image()), (0, image()), (1, image()[0]), (-3, image())):
        model = Rows([3], [1] if dim >= 0 else [1, 1], plain).double()
        model.dim = dim
        gm = traced(model)
        assert not narrow(gm)
        assert torch.equal(gm(x), model(x))


def test_a_width_that_no_layer_tells_is_not_guessed() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = plain(9)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.reader(torch.cat([x, y, y], 1))

    gm = traced(Given())
    assert not narrow(gm)
    assert narrow_readers(gm, {"x": 1, "y": 4}).modified
    wrong = traced(Given())
    assert not narrow_readers(wrong, {"x": 1, "y": 2}).modified  # 5 is not 9


def test_a_weight_that_is_shared_is_left_alone() -> None:
    model = nn.Module()
    model.part = Joining([2, 3], [1, 2, 2], plain)
    model.other = plain(8)
    gm = traced(model.part)
    model.other.weight = model.part.reader.weight
    assert not narrow(gm, model)
    assert narrow(gm)
    assert model.other.weight.shape == (4, 8, 3, 3)


def test_a_layer_that_is_used_elsewhere_is_left_alone() -> None:
    model = nn.Module()
    model.part = Joining([2, 3], [1, 2, 2], plain)
    model.again = model.part.reader
    gm = traced(model.part)
    assert not narrow(gm, model)


# How wide values are --------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.pool, self.glu = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.MaxPool2d(3), nn.GLU(1)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.conv(x))


WIDTHS: dict[str, tuple[Callable[[Any, Tensor], Any], int | None]] = {
    "norm, pool": (lambda m, x: m.pool(m.norm(functional.relu(x))), 6),
    "sum": (lambda m, x: x + m.norm(x), 6),
    "sum with one channel": (lambda m, x: x + x.chunk(6, 1)[0], None),
    "sum with what is not known": (lambda m, x: x + x.mean(1, keepdim=True), None),
    "chunk": (lambda m, x: x.chunk(3, 1)[2], 2),
    "uneven chunk": (lambda m, x: x.chunk(4, 1)[0], None),
    "chunk of rows": (lambda m, x: x.chunk(2, 2)[0], None),
    "split": (lambda m, x: torch.split(x, [1, 5], dim=1)[1], 5),
    "split by size": (lambda m, x: torch.split(x, 4, dim=1)[1], None),
    "cat": (lambda m, x: torch.cat((x, x.chunk(2, 1)[0]), dim=1), 9),
    "gated": (lambda m, x: m.glu(x), None),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_are_read_off_the_layers(name: str) -> None:
    body, expected = WIDTHS[name]
    gm = traced(Wide(body))
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    assert channels_of(gm).get(output.args[0].name) == expected
    assert expected in (None, gm(image(dtype=torch.float32)).shape[1])


# A value in its own parts ---------------------------------------------------------------------------------------------


class Parted(nn.Module):
    """Takes the value of a convolution apart; `body` says how it goes on."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.enter, self.leave, self.wide = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3), nn.Conv2d(12, 2, 3)
        self.slim, self.act = nn.Conv2d(4, 2, 3), nn.ReLU()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.enter(x))


def cat(*values: Tensor) -> Tensor:
    return torch.cat(values, 1)


def first_two(parts: Any) -> Tensor:
    return cat(parts[0], parts[1])


def shuffled(m: Any, x: Tensor) -> Tensor:
    """As ShuffleNet has it: the value lies in memory in order."""
    n, c, h, w = x.size()
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    joined = cat(*x.chunk(2, 1))
    return m.leave(joined.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w))


JOINS: dict[str, Callable[[Any, Tensor], Any]] = {
    "halves": lambda m, x: m.leave(cat(*x.chunk(2, 1))),
    "split": lambda m, x: m.leave(cat(*torch.split(x, [1, 3, 2], 1))),
    "shuffled": shuffled,
}
KEPT: dict[str, Callable[[Any, Tensor], Any]] = {
    "the first ones": lambda m, x: m.slim(first_two(torch.split(x, [2, 2, 2], 1))),
    "with others": lambda m, x: m.wide(cat(*x.chunk(2, 1), x + 1)),
    "twice": lambda m, x: m.wide(cat(*x.chunk(2, 1), *x.chunk(2, 1))),
    "swapped": lambda m, x: m.leave(cat(*reversed(x.chunk(2, 1)))),
    "of another": lambda m, x: m.leave(cat(x.chunk(2, 1)[0], m.enter(x[:, :3]).chunk(2, 1)[1])),
    "not all": lambda m, x: m.leave(cat(first_two(torch.split(x, [2, 2, 2], 1)), x[:, :2])),
    "rows": lambda m, x: m.leave(torch.cat(x.chunk(2, 1), 2).repeat(1, 2, 1, 1)),
    "given out": lambda m, x: cat(*x.chunk(2, 1)),
    "given out in order": lambda m, x: cat(*x.contiguous().chunk(2, 1)),
    "viewed": lambda m, x: cat(*x.transpose(2, 3).chunk(2, 1)).view(2, 6, -1),
    "viewed later": lambda m, x: m.act(cat(*x.transpose(2, 3).chunk(2, 1))).view(2, 6, -1),
    "split by size": lambda m, x: m.leave(first_two(torch.split(x, 3, 1))),
}


@pytest.mark.parametrize("name", JOINS)
def test_parts_in_order_are_the_value(name: str) -> None:
    model = Parted(JOINS[name]).eval()
    gm = traced(model)
    assert join_parts(gm).modified
    remove_dead_code(gm)
    assert not [node for node in gm.graph.nodes if node.target is torch.cat]
    for x in (image(dtype=torch.float32), image(dtype=torch.float32).to(memory_format=torch.channels_last)):
        assert torch.equal(gm(x), model(x))
        assert gm(x).stride() == model(x).stride()


@pytest.mark.parametrize("name", KEPT)
def test_other_parts_are_not_the_value(name: str) -> None:
    model = Parted(KEPT[name]).eval()
    gm = traced(model)
    assert not join_parts(gm).modified
    assert torch.equal(gm(image(dtype=torch.float32)), model(image(dtype=torch.float32)))


def test_a_value_twice_and_then_in_its_parts() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return m.wide(cat(left, right, right, right))

    model = Parted(body).double().eval()
    gm = traced(model)
    assert narrow(gm)
    assert join_parts(gm).modified
    remove_dead_code(gm)
    assert [node.name for node in gm.graph.nodes] == ["x", "enter", "wide", "output"]
    assert distance(gm(image()), model(image())) < EXACT


# Idle layers ----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Steps between two convolutions."""

    def __init__(self, *steps: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.layers = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * 9
        layers = iter(self.layers)
        for step in self.steps:
            x = (next(layers) if isinstance(step, nn.Module) else step)(x)
        return self.last(x)


SPARE: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "relu twice": ((nn.ReLU(inplace=True), nn.ReLU()), ["ReLU"]),
    "relu, however written": ((lambda x: x.relu_(), torch.relu, nn.ReLU(), functional.relu), ["relu"]),
    "relu6 twice": ((nn.ReLU6(), functional.relu6), ["ReLU6"]),
    "relu of relu6": ((nn.ReLU6(), nn.ReLU()), ["ReLU6"]),
    "relu6 of relu": ((nn.ReLU(), nn.ReLU6()), ["ReLU6"]),
    "hardtanh in hardtanh": ((nn.Hardtanh(-2, 3), functional.hardtanh, nn.Hardtanh(-2, 3)), ["hardtanh"]),
    "nothing": ((nn.Identity(), nn.ReLU(), nn.Dropout(0.0), nn.Dropout2d(0.0)), ["ReLU"]),
    "no depth": ((StochasticDepth(0.0, "row"), nn.ReLU()), ["ReLU"]),
}
BUSY: dict[str, tuple[Any, ...]] = {
    "others between": (nn.ReLU(), lambda x: x - 1, nn.ReLU()),
    "ranges that overlap": (nn.Hardtanh(-1, 1), nn.ReLU()),
    "not idempotent": (nn.SiLU(), nn.SiLU()),
    "dropout": (nn.Dropout(0.5), StochasticDepth(0.2, "row")),
    "leaky": (nn.ReLU(), nn.LeakyReLU(), nn.Softplus()),
}


def between(gm: fx.GraphModule) -> list[str]:
    names = [
        type(gm.get_submodule(str(node.target))).__name__
        if node.op == "call_module"
        else str(getattr(node.target, "__name__", node.target))
        for node in gm.graph.nodes
    ]
    return [name for name in names if name not in ("x", "mul", "Conv2d", "output")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SPARE)
def test_idle_layers_go(name: str, training: bool) -> None:
    steps, left = SPARE[name]
    model = Stack(*steps).train(training)
    gm = traced(model)
    assert skip_idle(gm).modified
    remove_dead_code(gm)
    assert between(gm) == left
    x = image(dtype=torch.float32)
    assert torch.equal(gm(x), model(x))
    assert gm.first.weight is model.first.weight
    (found,), (expected,) = (torch.autograd.grad(m(x).square().sum(), model.first.weight) for m in (gm, model))
    assert torch.equal(found, expected)
    assert float(found.abs().sum()) > 0


@pytest.mark.parametrize("name", BUSY)
def test_busy_layers_stay(name: str) -> None:
    gm = traced(Stack(*BUSY[name]))
    before = between(gm)
    assert not skip_idle(gm).modified
    assert between(gm) == before


def test_what_is_read_twice_is_computed_once() -> None:
    """With ``relu6`` reading past ``relu``, both would be left."""
    model = Stack(nn.ReLU(), lambda x: functional.relu6(x) + x)
    gm = traced(model)
    assert not skip_idle(gm).modified


def test_what_a_graph_gives_and_hooked_layers_stay() -> None:
    model = Stack(nn.ReLU(), nn.Identity())
    seen: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    gm = traced(model)
    assert not skip_idle(gm).modified
    gm(image(dtype=torch.float32))
    assert len(seen) == 1
    ends = traced(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity()))
    assert not skip_idle(ends).modified
