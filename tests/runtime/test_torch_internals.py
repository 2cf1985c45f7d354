"""Torch behaves as `fxprune.runtime.torch_internals` relies on.

A failure here means that torch changed: adapt the entry that the test names.
"""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.runtime import torch_internals as internals
from tests.helpers.internals import changed

pytestmark = pytest.mark.usefixtures("forget_compiled_code")

graph_break: Any = torch._dynamo.graph_break
Pair = namedtuple("Pair", ["first", "second"])


# Nested containers ---------------------------------------------------------------------------------------------------

TREE = {"a": [1, (2, 3)], "b": Pair(4, None)}


def test_tree_leaves() -> None:
    assert internals.tree_leaves(TREE) == [1, 2, 3, 4, None], changed(
        "tree_leaves", "the values of containers in order"
    )


def test_tree_flatten_and_tree_unflatten() -> None:
    leaves, form = internals.tree_flatten(TREE)
    again = internals.tree_unflatten([leaf and leaf * 2 for leaf in leaves], form)
    assert again == {"a": [2, (4, 6)], "b": Pair(8, None)}, changed("tree_unflatten", "it undoes tree_flatten")
    same, other = (str(internals.tree_flatten(tree)[1]) for tree in (TREE, {"a": [1, (2, 3)]}))
    assert str(form) == same, changed("tree_flatten", "str(form) is the same for equal forms")
    assert str(form) != other, changed("tree_flatten", "str(form) is different for different forms")


def test_tree_map_only() -> None:
    found = internals.tree_map_only(int, lambda value: -value, {"a": [1, "x"]})
    assert found == {"a": [-1, "x"]}, changed("tree_map_only", "it changes values of one type only")


# Modules and graphs --------------------------------------------------------------------------------------------------


def test_batch_norm_base() -> None:
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(kind, internals.BatchNormBase), changed(
            "BatchNormBase", f"{kind.__name__} is derived from it"
        )
    for other in (nn.GroupNorm, nn.LayerNorm):
        assert not issubclass(other, internals.BatchNormBase), changed("BatchNormBase", "other norms are not")
    assert internals.BatchNormBase.__qualname__ == "_BatchNorm", changed("BatchNormBase", "its name is in saved models")


def test_assertion() -> None:
    class Checked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[0] > 0, "empty")
            return x

    targets = [node.target for node in fx.symbolic_trace(Checked()).graph.nodes]
    assert targets.count(internals.ASSERTION) == 1, changed("ASSERTION", "fx traces it as one call")


def test_keep_when_copied() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    for name, value in (("first", [1]), ("second", "x")):
        setattr(gm, name, value)
        internals.keep_when_copied(gm, {name: value})
    twin: Any = copy.deepcopy(copy.deepcopy(gm))
    kept = (getattr(twin, "first", None), getattr(twin, "second", None))
    assert kept == ([1], "x"), changed("keep_when_copied", "deepcopy of a GraphModule keeps these attributes")


HOOKS: dict[str, Callable[[nn.Module], bool]] = {
    "register_forward_hook": internals.has_forward_hooks,
    "register_forward_pre_hook": internals.has_forward_hooks,
    "register_full_backward_hook": internals.has_backward_hooks,
    "register_full_backward_pre_hook": internals.has_backward_hooks,
}


@pytest.mark.parametrize("register", HOOKS)
def test_has_forward_hooks_and_has_backward_hooks(register: str) -> None:
    layer, found = nn.Linear(2, 2), HOOKS[register]
    before = found(layer)
    handle = getattr(layer, register)(lambda *_: None)
    during = found(layer), [other(layer) for other in HOOKS.values() if other is not found]
    handle.remove()
    seen = (before, *during, found(layer))
    assert seen == (False, True, [False, False], False), changed(found.__name__, f"{register} shows, and only there")


def test_saved_tensor_hooks() -> None:
    with torch.autograd.graph.save_on_cpu():
        during = internals.saved_tensor_hooks()
    seen = during is None, internals.saved_tensor_hooks()
    assert seen == (False, None), changed("saved_tensor_hooks", "it is None unless a context sets hooks")


def test_owns_tensors() -> None:
    behaviour = "layers have entries for parameters and buffers, also for those that are None"
    for layer, owns in ((nn.Linear(2, 2), True), (nn.InstanceNorm2d(3), True), (nn.Sequential(nn.Linear(2, 2)), False)):
        assert internals.owns_tensors(layer) == owns, changed("owns_tensors", behaviour)


def test_write_count() -> None:
    x = torch.ones(4)
    before = [internals.write_count(x + 1), internals.write_count(x)]
    x[:2].mul_(2)
    assert before == [0, 0] != [internals.write_count(x)] * 2, changed("write_count", "it counts writes to views only")


@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 1)])
def test_convolution_padding(padding: Any) -> None:
    layer, x = nn.Conv2d(3, 4, (3, 5), padding=padding, dilation=(2, 1)), torch.rand(1, 3, 9, 9)
    padded = functional.pad(x, internals.convolution_padding(layer))
    unpadded = functional.conv2d(padded, layer.weight, layer.bias, dilation=layer.dilation)
    assert torch.allclose(unpadded, layer(x)), changed("convolution_padding", "it is the padding of the convolution")


def test_layer_methods() -> None:
    class Scaled(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight, bias) * 2

    layer, plain = Scaled(3, 4, 1), nn.Conv2d(3, 4, 1)
    plain.load_state_dict(layer.state_dict())
    x = torch.rand(1, 3, 5, 5)
    assert torch.equal(layer(x), plain(x) * 2), changed("layer_methods", "Conv2d.forward calls _conv_forward")
    homes = [method.__module__ for method in internals.layer_methods(layer)]
    assert homes == ["torch.nn.modules.conv", __name__], changed("layer_methods", "methods tell where they are defined")
    assert [method.__name__ for method in internals.layer_methods(nn.Linear(2, 2))] == ["forward"]


def test_traced_calls() -> None:
    block = nn.Sequential(nn.ReLU())
    once, again = map(internals.traced_calls, list(fx.symbolic_trace(nn.Sequential(block, block)).graph.nodes)[1:3])
    assert [path for _, path in once] == [path for _, path in again] == ["0", "0.0"], changed("traced_calls", "paths")
    assert once[0][0] != again[0][0], changed("traced_calls", "each call has its own key")


# Symbolic shapes -----------------------------------------------------------------------------------------------------


def symbolic(*shape: int) -> tuple[internals.FakeTensorMode, Tensor]:
    mode = internals.symbolic_mode()
    return mode, internals.make_symbolic_tensor(mode, torch.empty(shape), [True, False, True, True])


def test_symbolic_mode_and_make_symbolic_tensor() -> None:
    mode, x = symbolic(2, 3, 8, 8)
    assert isinstance(mode, internals.FakeTensorMode)
    assert isinstance(x, internals.FakeTensor), changed("make_symbolic_tensor", "it makes a fake tensor")
    batch, channels, height, width = x.shape
    assert type(channels) is int, changed("make_symbolic_tensor", "a static size is a number")
    behaviour = "sizes that are equal by chance have different symbols"
    assert not internals.provably_equal(height, width), changed("symbolic_mode", behaviour)
    assert not internals.provably_equal(batch, 2), changed("make_symbolic_tensor", "a dynamic size is a symbol")


def test_shapes_only() -> None:
    mode, x = symbolic(2, 3, 8, 6)
    layer = nn.Conv2d(3, 5, 3, stride=2)
    with internals.shapes_only(mode):
        y = layer(x)
        z = functional.interpolate(y, scale_factor=2.0)
    assert isinstance(z, internals.FakeTensor), changed("shapes_only", "real weights and fake inputs may be mixed")
    assert not z.requires_grad, changed("shapes_only", "it records no gradients")
    sizes = [internals.current_size(size) for size in z.shape]
    assert sizes == [2, 5, 6, 4], changed("shapes_only", "operations compute symbolic shapes")


def test_current_size_and_provably_equal() -> None:
    mode, x = symbolic(2, 3, 8, 6)
    with internals.shapes_only(mode):
        y = functional.max_pool2d(x, 2)
        padded = functional.pad(y, (1, 1))
    assert [internals.current_size(size) for size in y.shape] == [2, 3, 4, 3]
    equal = internals.provably_equal(padded.shape[3] - 2, y.shape[3])
    assert equal, changed("provably_equal", "formulas that are equal for all values are found equal")
    assert not internals.provably_equal(y.shape[2], y.shape[3] + 1), changed("provably_equal", "others are not")
    again = internals.provably_equal(y.shape[2], y.shape[3] + 1)
    assert not again, changed("provably_equal", "the question itself is no assumption")


def test_size_formula_and_new_size_symbol() -> None:
    mode, x = symbolic(2, 3, 8, 6)
    with internals.shapes_only(mode):
        y = functional.avg_pool2d(functional.avg_pool2d(x, 3, 2, 1), 3, 2, 1)
    formula = internals.size_formula(y.shape[2])
    assert formula.count_ops() > 1, changed("size_formula", "it is a sympy expression")
    assert formula == internals.size_formula(y.shape[2]), changed("size_formula", "equal sizes have equal formulas")
    symbol = internals.new_size_symbol(mode, 4, "size_0")
    assert internals.size_formula(symbol).count_ops() == 0, changed("new_size_symbol", "its formula is one symbol")
    assert internals.current_size(symbol) == 4, changed("new_size_symbol", "it stands for the given number")
    with internals.shapes_only(mode):
        z = torch.empty([symbol, 3])
    assert internals.provably_equal(z.shape[0], symbol), changed("new_size_symbol", "it is the size of a tensor")
    assert not internals.provably_equal(symbol, 4), changed("new_size_symbol", "it is not fixed to the number")


def test_made_tensor() -> None:
    class Making(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(1)

    (name,) = [node.target for node in fx.symbolic_trace(Making()).graph.nodes if node.op == "get_attr"]
    assert str(name).startswith(internals.MADE_TENSOR), changed("MADE_TENSOR", "tensors in a forward have such names")


def test_compiled_call() -> None:
    layer = nn.Linear(1, 1)
    layer.compile(backend="eager")
    assert vars(layer)[internals.COMPILED_CALL] is not None, changed("COMPILED_CALL", "the compiled call is kept there")


def test_every_entry_has_a_test() -> None:
    here = Path(__file__)
    text = "".join(path.read_text(encoding="utf-8") for path in (here, here.with_name(f"{here.stem}_dynamo.py")))
    assert [name for name in internals.__all__ if f"internals.{name}" not in text] == []
