"""Values that are concatenated twice are read once, and outputs stay the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fxprune.capture.channels import channels_of
from fxprune.passes.concat import NARROWED_WEIGHTS
from tests.helpers.concatenations import EXACT, Joining, distance, image, narrow, plain, traced

widths = st.lists(st.integers(1, 5), min_size=1, max_size=4)
kinds: dict[str, Callable[..., nn.Module]] = {"conv": nn.Conv2d, "transposed": nn.ConvTranspose2d}


@settings(max_examples=60, deadline=None)
@given(widths=widths, kind=st.sampled_from(sorted(kinds)), bias=st.booleans(), stride=st.integers(1, 2), data=st.data())
def test_deduplicate_concat_keeps_outputs_of_random_graphs(
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


def test_deduplicate_concat_adds_up_weights() -> None:
    model = Joining([2, 3], [1, 2, 1, -2], lambda n: nn.Conv2d(n, 4, 1, bias=False)).double()
    gm = traced(model)
    assert narrow(gm)
    (key, shape), *others = gm.meta[NARROWED_WEIGHTS].items()
    assert (key, shape, others) == ("reader.weight", (4, 5, 1, 1), [])
    first, second, third, fourth = model.reader.weight.split([2, 3, 2, 3], 1)
    assert torch.equal(gm.reader.weight, torch.cat([first + third, second + 2 * fourth], 1))


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate", "circular"])
def test_deduplicate_concat_works_with_padding_and_dilation(padding: Any) -> None:
    def reader(channels: int) -> nn.Module:
        return nn.Conv2d(channels, 4, 3, padding=2, dilation=2, padding_mode=padding)

    model = Joining([2, 3], [1, 2, 2], reader).double()
    gm = traced(model)
    assert narrow(gm)
    assert distance(gm(image()), model(image())) < EXACT


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_deduplicate_concat_in_half_precision_rounds_once(dtype: torch.dtype, exact: float) -> None:
    model = Joining([4, 6], [1, 2, 2, 2], plain).to(dtype)
    gm = traced(model)
    assert narrow(gm)
    weight = model.reader.weight.detach().double()
    sums = torch.cat([weight[:, :4], weight[:, 4:10] + weight[:, 10:16] + weight[:, 16:]], 1)
    assert gm.reader.weight.dtype == dtype
    assert torch.equal(gm.reader.weight, sums.to(dtype)) or dtype is torch.float32
    x = image(dtype=dtype)
    assert distance(gm(x), model(x)) < exact


def test_deduplicate_concat_keeps_memory_format_mode_and_requires_grad() -> None:
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


def test_narrowed_layer_can_be_trained_and_exported() -> None:
    gm = traced(Joining([2, 3], [1, 2, 2], plain).double())
    assert narrow(gm)
    expected = gm(image())
    exported = torch.export.export(gm.eval(), (image(),)).module()(image())
    assert distance(exported, expected) < EXACT
    gm.train()(image()).square().sum().backward()
    assert gm.reader.weight.grad.shape == gm.reader.weight.shape
    assert float(gm.reader.weight.grad.abs().sum()) > 0


def test_deduplicate_concat_narrows_all_readers() -> None:
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
def test_channels_of_reads_widths_off_the_layers(name: str) -> None:
    body, expected = WIDTHS[name]
    gm = traced(Wide(body))
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    assert channels_of(gm).get(output.args[0].name) == expected
    assert expected in (None, gm(image(dtype=torch.float32)).shape[1])
