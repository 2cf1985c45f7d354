"""Random module trees: nested lists and dictionaries of layers, shared children, in-place layers, hooks and flags."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 4


def conv() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


class ConvNorm(nn.Module):
    """A convolution, a norm and an activation, which may overwrite."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv(), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, augmented: bool) -> None:
        super().__init__()
        self.inner, self.augmented = inner, augmented

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.augmented:
            out = out * 0.5
            out += x
            return out
        return x + out * 0.5


class Functions(nn.Module):
    """Two convolutions with functions around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))))


class Split(nn.Module):
    """Half of the channels pass by a list of layers; all values are joined, as in CSP blocks."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(WIDTH, WIDTH, 1)
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, padding=1) for _ in range(count))
        self.leave = nn.Conv2d((2 + count) * WIDTH // 2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = list(self.enter(x).chunk(2, 1))
        values.extend(layer(values[-1]) for layer in self.layers)
        return self.leave(torch.cat(values, 1))


class Mixing(nn.Module):
    """A block that takes a second value by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = conv(), conv()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.own(x) * torch.sigmoid(self.cross(context))


class Pair(nn.Module):
    """A block that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.own = conv()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.own(x), None


class Twice(nn.Module):
    """Calls one child two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Named(nn.Module):
    """A dictionary of layers whose outputs are added, and a list that is called in a loop."""

    def __init__(self, parts: dict[str, nn.Module], then: list[nn.Module]) -> None:
        super().__init__()
        self.parts, self.then = nn.ModuleDict(parts), nn.ModuleList(then)

    def forward(self, x: Tensor) -> Tensor:
        total = sum(part(x) for part in self.parts.values())
        for layer in self.then:
            total = layer(total)
        return total


class Overwriting(nn.Module):
    """Its in-place activation reads what the block before returns, and that value is read again."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before, self.act, self.after = before, nn.ReLU(inplace=True), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.before(x))) + x


class Tree(nn.Module):
    """A random tree with a stem and a head. `export` and the class attribute are read by its users only."""

    stride = 1

    def __init__(self, seed: int, eager: bool) -> None:
        super().__init__()
        make = random.Random(seed)
        self.eager, self.export = eager, False
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.body = nn.Sequential(*(random_part(make, 2) for _ in range(make.randint(2, 4))))
        self.mixing, self.pair = Mixing(), Pair()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        if self.eager and bool(first.isnan().any()):  # no graph as a whole
            return first
        value, _ = self.pair(self.body(first))
        value = self.mixing(value, context=first)
        out = self.head(value.mean((2, 3)))
        return out.softmax(1) if self.export else out

    def decode(self, out: Tensor) -> Tensor:
        return out.argmax(1)


def random_part(make: random.Random, depth: int) -> nn.Module:
    """A block of `WIDTH` channels in and out."""
    shared = ConvNorm(False)

    def inner() -> nn.Module:
        return random_part(make, depth - 1) if depth else conv()

    kinds: list[Callable[[], nn.Module]] = [
        conv,
        Functions,
        lambda: ConvNorm(make.random() < 0.5),
        lambda: Split(make.randint(1, 3)),
        lambda: Residual(inner(), make.random() < 0.5),
        lambda: nn.Sequential(*(inner() for _ in range(make.randint(1, 3)))),
        lambda: Named({"left": inner(), "right": inner()}, [inner()]),
        lambda: Twice(inner()),
        lambda: Overwriting(inner()),
        lambda: nn.Sequential(shared, conv(), shared),
    ]
    return make.choice(kinds)()


def random_tree(seed: int, eager: bool) -> Tree:
    """A tree with weights and statistics of its own, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Tree(seed, eager)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean = torch.rand(WIDTH) - 0.5
                part.running_var = torch.rand(WIDTH) + 0.5
    return model.eval()
