"""A concatenation of all parts of a value becomes the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.passes.concat import collapse_split_concat
from fxprune.passes.dead_code import remove_dead_code
from tests.helpers.concatenations import EXACT, distance, image, narrow, traced

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
def test_concat_of_all_parts_in_order_becomes_the_value(name: str) -> None:
    model = Parted(JOINS[name]).eval()
    gm = traced(model)
    assert collapse_split_concat(gm).modified
    remove_dead_code(gm)
    assert not [node for node in gm.graph.nodes if node.target is torch.cat]
    for x in (image(dtype=torch.float32), image(dtype=torch.float32).to(memory_format=torch.channels_last)):
        assert torch.equal(gm(x), model(x))
        assert gm(x).stride() == model(x).stride()


@pytest.mark.parametrize("name", KEPT)
def test_concat_of_other_parts_is_kept(name: str) -> None:
    model = Parted(KEPT[name]).eval()
    gm = traced(model)
    assert not collapse_split_concat(gm).modified
    assert torch.equal(gm(image(dtype=torch.float32)), model(image(dtype=torch.float32)))


def test_concat_of_a_value_and_its_parts_is_deduplicated() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return m.wide(cat(left, right, right, right))

    model = Parted(body).double().eval()
    gm = traced(model)
    assert narrow(gm)
    assert collapse_split_concat(gm).modified
    remove_dead_code(gm)
    assert [node.name for node in gm.graph.nodes] == ["x", "enter", "wide", "output"]
    assert distance(gm(image()), model(image())) < EXACT
