"""Private copies: functions that are set on modules refer to the copy; state is restored."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.runtime.private_copy import preserve_state, private_copy
from tests.helpers.models import Block, Tiny, build, pixels, tiny

X = pixels(2, 3, 16, 16)
SCALE = 1.5


def closure(model: nn.Module) -> None:
    fc = model.get_submodule("fc")
    old = fc.forward
    vars(fc)["forward"] = lambda x: old(x) * SCALE


def nested(model: nn.Module) -> None:
    fc = model.get_submodule("fc")
    old = fc.forward

    def outer(x: Tensor) -> Tensor:
        def inner() -> Tensor:
            return old(x)

        return inner() * SCALE

    vars(fc)["forward"] = outer


def default(model: nn.Module) -> None:
    fc = model.get_submodule("fc")

    def forward(x: Tensor, old: Any = fc.forward, *, weight: Tensor = fc.weight) -> Tensor:  # type: ignore[assignment]
        return old(x) * (SCALE + 0 * weight.sum())

    vars(fc)["forward"] = forward


def partial(model: nn.Module) -> None:
    def forward(module: Any, x: Tensor, *, scale: float) -> Tensor:
        return module.kept(x) * scale

    fc = model.get_submodule("fc")
    vars(fc)["kept"] = fc.forward
    vars(fc)["forward"] = functools.update_wrapper(functools.partial(forward, fc, scale=SCALE), fc.forward)


def partial_of_a_closure(model: nn.Module) -> None:
    closure(model)
    fc = model.get_submodule("fc")
    vars(fc)["forward"] = functools.partial(vars(fc)["forward"])


def in_a_container(model: nn.Module) -> None:
    closure(model)
    fc = model.get_submodule("fc")
    steps = {"first": (vars(fc)["forward"], [fc])}
    vars(fc)["forward"] = lambda x: steps["first"][0](x)


def recursive(model: nn.Module) -> None:
    fc = model.get_submodule("fc")
    old = fc.forward

    def forward(x: Tensor, again: bool = True) -> Tensor:
        return forward(x, again=False) * SCALE if again else old(x)

    vars(fc)["forward"] = forward


def hook(model: nn.Module) -> None:
    fc: Any = model.get_submodule("fc")
    fc.register_forward_hook(lambda module, args, output: (fc.weight @ args[0].T).T * SCALE + SCALE * fc.bias)


def pre_hook(model: nn.Module) -> None:
    fc: Any = model.get_submodule("fc")
    stem: Any = model.get_submodule("stem")
    fc.register_forward_pre_hook(lambda module, args: (args[0] + 0 * stem.weight.sum(),))
    hook(model)


def on_an_object(model: nn.Module) -> None:
    class Holder:
        step: Callable[[Tensor], Tensor]

    closure(model)
    fc, holder = model.get_submodule("fc"), Holder()
    holder.step = vars(fc)["forward"]
    vars(fc)["holder"] = holder
    vars(fc)["forward"] = lambda x: holder.step(x)


def from_global_variables(model: nn.Module) -> None:
    """As at the top of a script or in a notebook."""
    scope: dict[str, Any] = {"m": model, "SCALE": SCALE, "__name__": "script"}
    exec("old = m.fc.forward\nm.fc.forward = lambda x: old(x) * SCALE", scope)


PATCHES = [
    closure, nested, default, partial, partial_of_a_closure, in_a_container, recursive, hook, pre_hook, on_an_object,
    from_global_variables,
]  # fmt: skip


@pytest.mark.parametrize("patch", PATCHES)
def test_functions_set_on_a_copied_model_use_the_layers_of_the_copy(patch: Callable[[nn.Module], None]) -> None:
    model = tiny()
    plain = model(X)
    patch(model)
    assert torch.allclose(model(X), plain * SCALE, atol=1e-6)
    twin = private_copy(model)
    assert torch.equal(twin(X), model(X))
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    assert not twin(X).any()
    assert torch.allclose(model(X), plain * SCALE, atol=1e-6), "the original still uses its own layers"


def test_a_copy_with_functions_does_not_keep_the_original_alive() -> None:
    model = tiny()
    closure(model)
    twin, original = private_copy(model), weakref.ref(model.get_submodule("fc"))
    del model
    gc.collect()
    assert original() is None
    assert twin(X).shape == (2, 5)


def test_functions_that_refer_to_no_layer_are_the_same_objects() -> None:
    model, seen = tiny(), list[int]()
    vars(model)["scorer"] = torch.relu
    vars(model)["act"] = nn.functional.relu
    vars(model)["note"] = note = lambda value: seen.append(value)
    twin: Any = private_copy(model)
    assert twin.scorer is torch.relu
    assert twin.act is nn.functional.relu
    assert twin.note is note


def test_copied_function_keeps_its_name_and_attributes() -> None:
    model = tiny()
    fc: Any = model.get_submodule("fc")

    @functools.wraps(fc.forward)
    def forward(x: Tensor) -> Tensor:
        return fc.weight.sum() * x

    vars(forward)["kind"] = "patched"
    vars(model)["extra"] = forward
    found = vars(private_copy(model))["extra"]
    assert isinstance(found, FunctionType)
    assert id(found) != id(forward)
    assert (found.__name__, found.__doc__, vars(found)["kind"]) == ("forward", forward.__doc__, "patched")
    assert vars(found)["__wrapped__"].__self__ is not fc


class Stateful(Tiny):
    mean: Tensor
    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, list[float]()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.mean()))
        self.last = x
        self.mean += x.mean()
        self.cache = x
        return super().forward(x)


def test_preserve_state_restores_attributes_and_buffers() -> None:
    model = build(Stateful)
    assert isinstance(model, Stateful)
    model(X)
    del model.last
    mean, kept = model.mean, model.mean.clone()
    model.cache = None
    with preserve_state(model):
        model.train()
        model(X)
        model.mean = torch.ones(1)
    assert model.training
    assert (model.calls, len(model.seen), hasattr(model, "last")) == (1, 1, False)
    assert vars(model)["_buffers"]["cache"] is None
    assert model.mean is mean
    assert torch.equal(mean, kept)
    assert "mean" in dict(model.named_buffers())


def test_preserve_state_leaves_lazy_layers_initialized() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), Block(8))
    with preserve_state(model):
        model(X)
    assert isinstance(model[0], nn.Conv2d)
    assert model[0].in_channels == 3
    assert model(X).shape == (2, 8, 14, 14)


def test_preserve_state_takes_back_a_module_in_the_place_of_an_attribute() -> None:
    """As a detector that makes its criterion at its first loss: the attribute is None before."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.criterion = None  # type: ignore[assignment]
    with preserve_state(model):
        model.criterion = nn.CrossEntropyLoss()
    assert model.criterion is None
    assert [name for name, _ in model.named_children()] == ["0"]
