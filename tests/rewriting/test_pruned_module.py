"""Modules that stand where others were: what they keep of the original, copies, pickles, and errors."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxprune.capture.tracer import FunctionalTracer
from fxprune.graph.fx_utils import check_constant
from fxprune.passes.bypass import bypass_regions
from fxprune.rewriting.pruned_module import PassThrough, PrunedModule, graph_to_rows, rows_to_graph
from tests.helpers.paths import ROOT

X = torch.linspace(-1, 1, 2 * 4 * 3 * 3).reshape(2, 4, 3, 3)


class Neck(nn.ModuleDict):
    """A container with a forward, methods, class attributes, hooks, and attributes of all kinds."""

    levels = 3

    def __init__(self) -> None:
        super().__init__({"first": nn.Conv2d(4, 4, 1), "second": nn.Conv2d(4, 4, 1)})
        self.scale, self.mean = 2.0, torch.ones(1)
        self.register_buffer("count", torch.zeros(1), persistent=False)
        self.kept, self.own = [1, 2], self.decode
        self.everything = [self["first"], self["second"]]
        self.frozen = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self["second"](functional.relu(self["first"](x)))) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        return self.frozen(x) * self.levels

    def both(self, x: Tensor) -> Tensor:
        return self["second"](self["first"](x))

    def second_weight(self) -> Tensor:
        return self.get_parameter("second.weight") * self.second.weight.ndim  # type: ignore[union-attr,operator]

    @property
    def width(self) -> int:
        return int(self.scale)

    @staticmethod
    def twice(x: int) -> int:
        return 2 * x

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    def train(self, mode: bool = True) -> Neck:
        super().train(mode)
        self.frozen.eval()
        return self


def without(original: nn.Module, exit_: str, stand_in: str, changed: tuple[str, ...]) -> PrunedModule:
    """The original without one region."""
    gm = fx.GraphModule(original, FunctionalTracer().trace(original))
    bypass_regions(gm, {exit_: stand_in})
    gm.graph.eliminate_dead_code()
    return PrunedModule(original, gm.graph, changed)


@pytest.fixture
def neck() -> Neck:
    return Neck().eval()


@pytest.fixture
def pruned(neck: Neck) -> Any:
    return without(neck, "relu_1", "relu", ("second",))


def test_pruned_module_runs_its_graph(neck: Neck, pruned: Any) -> None:
    assert torch.equal(pruned(X), functional.relu(neck["first"](X)) * 2)
    assert isinstance(pruned, fx.GraphModule)
    assert repr(pruned).startswith("Neck(")


def test_pruned_module_has_the_methods_and_attributes_of_the_original(neck: Neck, pruned: Any) -> None:
    assert (pruned.levels, pruned.scale, pruned.kept, pruned.width) == (3, 2.0, [1, 2], 2)
    assert (pruned.twice(4), len(pruned), set(pruned), "first" in pruned) == (8, 3, set(neck), True)
    assert torch.equal(pruned.decode(X), neck.decode(X))
    assert pruned["first"] is neck["first"]
    assert "decode" in dir(pruned)
    assert set(pruned.state_dict()) == set(neck.state_dict())
    assert torch.equal(pruned.mean, neck.mean)
    with pytest.raises(AttributeError, match=r"'Neck' object, which was pruned, has no attribute 'decoed'"):
        pruned.decoed  # noqa: B018


def test_pruned_module_names_what_is_gone(pruned: Any) -> None:
    del pruned.second
    with pytest.raises(AttributeError, match=r"'second' of this Neck was removed"):
        pruned.second  # noqa: B018
    with pytest.raises(AttributeError, match=r"Neck\.second_weight reads 'second', which changed .*original model"):
        pruned.second_weight()


def test_pruned_module_holds_nothing_of_the_original(neck: Neck, pruned: Any) -> None:
    assert not hasattr(pruned, "everything")
    assert pruned.own.__self__ is pruned
    assert copy.deepcopy(pruned).own.__self__ is not pruned
    pruned.kept.append(3)
    assert neck.kept == [1, 2, 3]  # plain values are shared, as a shallow copy shares them
    pruned.frozen = nn.Identity()
    assert isinstance(neck.frozen, nn.BatchNorm2d)


def test_overrides_of_torch_methods_work_with_super(pruned: Any) -> None:
    pruned.train()
    assert pruned.training
    assert not pruned.frozen.training
    assert not copy.deepcopy(pruned).train().frozen.training


def test_hooks_of_the_original_run(neck: Neck) -> None:
    seen: list[str] = []
    neck.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    neck.register_load_state_dict_pre_hook(lambda *_: seen.append("loaded"))  # type: ignore[no-untyped-call]
    pruned = without(neck, "relu_1", "relu", ())
    pruned(X)
    pruned.load_state_dict(pruned.state_dict())
    assert seen == ["Neck", "loaded"]


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, through_pickle, through_file])
def test_copies_of_copies_are_whole(make: Any, pruned: Any) -> None:
    pruned.f, pruned.meta["note"] = -1, "kept"
    expected = pruned(X)
    again = make(make(pruned))
    assert torch.equal(again(X), expected)
    assert (again.f, again.meta["note"], again.levels, again.width) == (-1, "kept", 3, 2)
    assert (again.changed_names, again.original_class, len(again)) == (pruned.changed_names, Neck, 3)
    assert list(again.count.shape) == [1]
    assert set(again.state_dict()) == set(pruned.state_dict())
    if make is not copy.copy:
        again["first"].weight.data.zero_()
        assert torch.equal(pruned(X), expected)


def test_pickle_loads_in_another_process(pruned: Any, tmp_path: Path) -> None:
    torch.save({"module": pruned, "x": X}, tmp_path / "module.pt")
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch; saved = torch.load('module.pt', weights_only=False)\n"
        "torch.save(saved['module'](saved['x']), 'output.pt')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "output.pt"), pruned(X))


def test_a_module_pruned_twice_keeps_its_first_class(pruned: Any) -> None:
    twice: Any = PrunedModule(pruned, pruned.graph, ("first",))
    assert twice.original_class is Neck
    assert twice.changed_names == {"first", "second"}
    assert torch.equal(copy.deepcopy(twice)(X), pruned(X))


def test_a_pruned_graph_module_stays_a_graph_module() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)))
    pruned = without(gm, "_1", "_0", ())
    assert torch.equal(through_pickle(pruned)(X), gm.get_submodule("0")(X))


class Odd(nn.Module):
    """Targets and arguments of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        pooled = functional.max_pool2d(x, 2, stride=1)
        sliced = x[:, 1:, ..., ::2].to(torch.float64, memory_format=torch.contiguous_format)
        parts = torch.ops.aten.split.Tensor(x, 2, 1)
        return {
            "pooled": pooled.clamp(min=float("-inf")),
            "sliced": sliced,
            "part": parts[0] * self.weight[:2, None, None],
        }


def test_rows_hold_every_kind_of_target_and_argument() -> None:
    gm = fx.symbolic_trace(Odd())
    rows = pickle.loads(pickle.dumps(list(graph_to_rows(gm.graph))))
    again = fx.GraphModule(gm, rows_to_graph(rows))
    assert [(node.name, node.op, node.target) for node in again.graph.nodes] == [
        (node.name, node.op, node.target) for node in gm.graph.nodes
    ]
    first, second = gm(X), again(X)
    assert all(torch.equal(first[name], second[name]) for name in first)


# PassThrough ---------------------------------------------------------------------------------------------------------


def test_pass_through_returns_its_argument_in_the_form_of_the_block() -> None:
    assert PassThrough(1, "hidden")(None, X) is X
    assert PassThrough(1, "hidden")(None, hidden=X) is X
    result = PassThrough(0, "hidden", (PassThrough.SLOT, None))(X, mask=None)
    assert result[0] is X
    assert result[1] is None
    assert isinstance(PassThrough(0, "hidden", [PassThrough.SLOT])(X), list)
    turned = X.transpose(0, 1)
    (value,) = PassThrough(0, "hidden", (PassThrough.SLOT,), contiguous=True)(turned)
    assert value.is_contiguous()
    assert torch.equal(value, turned)


def test_pass_through_is_readable_and_can_be_copied() -> None:
    layer = PassThrough(0, "hidden", (PassThrough.SLOT, None))
    assert repr(layer) == "PassThrough(returns='hidden', in a tuple)"
    assert repr(through_pickle(copy.deepcopy(layer))) == repr(layer)
    with pytest.raises(TypeError, match="without the argument 'hidden'"):
        layer()


@pytest.mark.parametrize(("value", "expected"), [(None, None), (2, 2), ("mean", "mean")])
def test_constant_arguments_are_accepted(value: Any, expected: Any) -> None:
    check_constant(value, expected, "mask")


@pytest.mark.parametrize(("value", "found"), [(X, "a tensor"), (3, "3")])
def test_other_arguments_are_refused(value: Any, found: str) -> None:
    with pytest.raises(TypeError, match=f"traced with mask=None and got {found}; .* that give mask"):
        check_constant(value, None, "mask")
