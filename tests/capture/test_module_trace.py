"""`trace_module`: arguments that are constants, arguments that depend on the mode, tensors that are no state."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.capture.islands import capture_islands
from fxprune.capture.module_trace import Traced, Untraced, constant_arguments, trace_module
from fxprune.errors import BatchError
from fxprune.graph.fx_utils import fingerprint
from fxprune.graph.symbolic_shapes import bind_placeholders, propagate_symbolic, tensor_specs
from fxprune.passes.dead_code import remove_dead_code
from tests.helpers.zoo import conv, image_batch


def traced(module: nn.Module, **options: Any) -> fx.GraphModule:
    found = trace_module(module, (), **options)
    assert isinstance(found, Traced), found
    return found.gm


# Constant arguments --------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Takes another way if it gets a mask; scales by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.one = conv(3)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, both: bool = False) -> Any:
        y = self.one(x) * scale
        if mask is not None:
            y = y * mask
        return (y, x) if both else y


class Collecting(Masked):
    """Collects arguments that it does not know."""

    def forward(self, x: Tensor, *rest: Any, scale: float = 2.0, **options: Any) -> Any:
        if options.get("mask") is not None:
            x = x * options["mask"]
        return super().forward(x, scale=scale)


def passing_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Collecting):
    forward = passing_on(Collecting.forward)


SPEC = object()  # in place of a tensor


@pytest.mark.parametrize(
    ("kind", "calls", "constants"),
    [
        (Masked, [((SPEC,), {})], {"mask": None, "scale": 2.0, "both": False}),
        (Masked, [((SPEC, None), {"scale": 3}), ((SPEC,), {"scale": 3})], {"mask": None, "scale": 3, "both": False}),
        (Masked, [((SPEC,), {"scale": 1}), ((SPEC,), {"scale": 1.0})], {"mask": None, "both": False}),
        (Masked, [((SPEC,), {}), ((SPEC, SPEC), {})], {"scale": 2.0, "both": False}),
        (Collecting, [((SPEC,), {"mask": None})], {"*rest": (), "mask": None, "scale": 2.0}),
        (Collecting, [((SPEC, SPEC), {})], {"scale": 2.0}),
        (Decorated, [((SPEC,), {"mask": ("a", 1)})], {"*rest": (), "mask": ("a", 1), "scale": 2.0}),
        (nn.Bilinear, [((SPEC, 2), {}), ((SPEC, 2), {})], {}),
    ],
)
def test_constant_arguments_are_the_same_in_all_calls(kind: type[nn.Module], calls: Any, constants: Any) -> None:
    module = kind(1, 1, 1) if kind is nn.Bilinear else kind()
    assert constant_arguments(module, calls) == constants


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([((SPEC,), {"mask": SPEC})], "keyword argument 'mask'"),
        ([((SPEC,), {"mask": 1}), ((SPEC,), {"mask": 2})], "keyword argument 'mask'"),
        ([((SPEC,), {"mask": 1}), ((SPEC,), {})], "keyword argument 'mask'"),
        ([((), {})], "missing"),
    ],
)
def test_collected_keyword_that_is_no_constant_is_refused(calls: Any, words: str) -> None:
    found = constant_arguments(Collecting(), calls)
    assert isinstance(found, Untraced)
    assert words in found.reason


@pytest.mark.parametrize("options", [{}, {"scale": 3.0}, {"both": True}])
def test_constants_decide_the_way_that_a_forward_takes(options: dict[str, Any]) -> None:
    module, x = Masked(), image_batch()
    constants = constant_arguments(module, [((SPEC,), options)])
    gm = traced(module, constants=constants)
    wanted, output = module(x, **options), gm(x, **options)
    assert torch.equal(output[0], wanted[0])
    assert [node.target for node in gm.graph.nodes if node.op == "placeholder"] == ["x", "mask", "scale", "both"]


@pytest.mark.parametrize("kind", [Collecting, Decorated])
@pytest.mark.parametrize("options", [{}, {"mask": None}])
def test_collected_constants_reach_the_forward(kind: type[nn.Module], options: dict[str, Any]) -> None:
    module, x = kind(), image_batch()
    constants = constant_arguments(module, [((SPEC,), options)])
    gm = traced(module, constants=constants)
    gm.graph.lint()
    assert torch.equal(gm(x, **options), module(x, **options))
    assert torch.equal(fx.Interpreter(gm).run(*bind_placeholders(gm, (x,), options)), module(x, **options))
    assert propagate_symbolic(gm, tensor_specs((x,)), options).failure == ""


@pytest.mark.parametrize("options", [{"mask": SPEC}, {"mask": 2}, {"other": None}, {}])
def test_other_values_of_constants_are_refused_by_name(options: dict[str, Any]) -> None:
    gm = traced(Collecting(), constants={"mask": None, "scale": 2.0, "*rest": ()})
    with pytest.raises(BatchError, match=r"'mask'|mask=None|'other'"):
        bind_placeholders(gm, (image_batch(),), options)


def test_argument_that_differs_between_calls_of_one_batch_is_no_constant() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Masked()

        def forward(self, x: Tensor) -> Tensor:
            x = self.part(x, scale=2.0) if float(x.sum()) > -1e9 else x
            return self.part(x, scale=0.5)

    model = Twice()
    wanted = model(image_batch())
    captured = copy.deepcopy(model)
    islands, _ = capture_islands(captured, [lambda network: network(image_batch())], True)
    assert [(island.name, dict(island.constants)) for island in islands] == [("part", {"both": False, "mask": None})]
    assert torch.equal(captured(image_batch()), wanted)


# Arguments that depend on the mode -----------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Its arguments depend on the mode, as a flag and as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3), conv(3)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.dropout(self.one(x), 0.5, training=self.training)
        return x + torch.clamp(self.two(y), max=0.1 if self.training else 0.2)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Dropping(), Dropping())

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.parts(x), 0.25, self.training)


def same_in_both_modes(gm: nn.Module, module: nn.Module) -> bool:
    def run(model: nn.Module, training: bool) -> Tensor:
        torch.manual_seed(3)
        return model.train(training)(image_batch())

    return all(torch.equal(run(gm, training), run(module, training)) for training in (True, False, True))


@pytest.mark.parametrize("kind", [Dropping, Stack])
@pytest.mark.parametrize("training", [True, False])
def test_argument_that_depends_on_the_mode_follows_the_mode(kind: type[nn.Module], training: bool) -> None:
    module = kind().train(training)
    gm = traced(module)
    assert [part.training for part in gm.modules()] == [training] * len(list(gm.modules()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm.graph.lint()
        assert not remove_dead_code(gm).modified
    assert same_in_both_modes(gm, module)
    assert same_in_both_modes(copy.deepcopy(gm), module)
    assert same_in_both_modes(fx.GraphModule(gm, gm.graph), module)
    assert propagate_symbolic(gm, tensor_specs((image_batch(),)), {}).failure == ""


def test_mode_of_one_part_decides_for_that_part_only() -> None:
    module = Stack().train()
    gm = traced(module)
    for model in (module, gm):
        model.eval()
        model.get_submodule("parts.1").train()
    torch.manual_seed(0)
    wanted = module(image_batch())
    torch.manual_seed(0)
    assert torch.equal(gm(image_batch()), wanted)


def test_fingerprint_does_not_depend_on_the_mode_at_tracing() -> None:
    module = Stack()
    assert fingerprint(traced(module.train())) == fingerprint(traced(module.eval()))


def test_mode_that_another_module_reads_is_no_switch() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = conv(3)

        def forward(self, x: Tensor, flag: bool) -> Tensor:
            return functional.dropout(self.one(x), 0.5, flag)

    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.part = conv(3), Told()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.stem(x), self.training)

    found = trace_module(Telling(), ())
    assert isinstance(found, Traced)
    assert list(found.opaque) == ["part"]
    assert same_in_both_modes(found.gm, Telling()) is False  # other weights
    assert "train and in eval mode" in found.opaque["part"]


# Tensors that are no state -------------------------------------------------------------------------------------------


class Shifting(nn.Module):
    """Reads a plain tensor, a buffer that is not saved, one that is, and a tensor that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.plain = conv(3), torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        self.passing: Tensor
        self.saved: Tensor
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.register_buffer("saved", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x - self.plain) * self.passing * self.saved + torch.arange(3.0).view(1, 3, 1, 1)


def test_graph_saves_what_its_module_saves() -> None:
    model = nn.Sequential(Shifting())
    before = {part: set(vars(part)) for part in model.modules()}
    gm = traced(model)
    assert {part: set(vars(part)) for part in model.modules()} == before
    for copied in (gm, copy.deepcopy(gm)):
        assert set(copied.state_dict()) == set(model.state_dict())
        assert torch.equal(copied(image_batch()), model(image_batch()))


def test_tensor_that_differs_at_every_call_makes_no_graph() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = conv(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + torch.rand(3).view(1, 3, 1, 1)

    assert isinstance(trace_module(Noisy(), ()), Untraced)


class CountingNorm(nn.Module):
    """A norm of its own that counts its calls in train mode, as batch norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.calls: Tensor
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
        return functional.batch_norm(x, None, None, self.weight, training=True)


def test_module_that_overwrites_a_buffer_stays_one_node_and_keeps_it() -> None:
    model = nn.Sequential(conv(3), CountingNorm(), conv(3)).train()
    for _ in range(2):
        found = trace_module(model, ())
        assert isinstance(found, Traced)
        assert found.opaque == {"1": "its forward overwrites its buffer 'calls'"}
        assert int(model.get_buffer("1.calls")) == 0
    traced(model)(image_batch())
    assert int(model.get_buffer("1.calls")) == 1
    assert isinstance(trace_module(CountingNorm(), ()), Untraced)


# Fingerprints --------------------------------------------------------------------------------------------------------


class Typed(nn.Module):
    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.one, self.dtype = conv(3), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.to(self.dtype or self.one.weight.dtype))


def test_fingerprint_does_not_depend_on_the_precision_of_the_weights() -> None:
    class OwnType(Typed):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x.to(next(self.parameters()).dtype))

    def of(dtype: torch.dtype) -> str:
        return fingerprint(traced(Typed(dtype)))

    assert fingerprint(traced(OwnType())) == fingerprint(traced(OwnType().bfloat16()))
    assert of(torch.float32) == of(torch.float16) != of(torch.int32)
