"""Blocks whose branches are folded into one layer after training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fxprune
from fxprune.profiling.folded_blocks import find_folded_blocks, fold_method
from tests.helpers.flops import flops_of

IMAGES = torch.rand(2, 3, 12, 10)


def fused(branch: nn.Sequential) -> nn.Conv2d:
    conv, norm = copy.deepcopy(branch).eval()
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(conv, norm)


class Branches(nn.Module):
    """A 3x3 and a 1x1 convolution, each with a norm, and a norm alone, which are added up; gated behind."""

    def __init__(self, channels: int, out: int | None = None) -> None:
        super().__init__()
        out = out or channels
        self.large = nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out))
        self.small = nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out))
        self.gate = nn.Conv2d(out, out, 1)
        self.folded: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.large(x) + self.small(x) if self.folded is None else self.folded(x)
        return functional.relu(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())

    def reparameterize(self) -> None:
        conv, small = fused(self.large), fused(self.small)
        assert conv.bias is not None
        assert small.bias is not None
        conv.weight.data += functional.pad(small.weight, [1] * 4)
        conv.bias.data += small.bias
        self.folded = conv
        del self.large, self.small


class Returning(Branches):
    """The same, by a method that returns the layer and leaves the block as it is; without a gate."""

    reparameterize: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)

    def fuse(self) -> nn.Module:
        twin = copy.deepcopy(self)
        Branches.reparameterize(twin)
        assert twin.folded is not None
        return twin.folded


class TwoSteps(Branches):
    """The same; whoever folds it also has to replace its forward."""

    reparameterize: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)

    def fuse_convs(self) -> None:
        Branches.reparameterize(self)

    def forward_fuse(self, x: Tensor) -> Tensor:
        assert self.folded is not None
        return self.folded(x)


class Net(nn.Module):
    """A stem, blocks, and a head. `fuse` folds all blocks at once."""

    def __init__(self, kind: type[Branches] = Branches) -> None:
        super().__init__()
        self.stem, self.head = kind(3, 8), nn.Linear(8, 5)
        self.blocks = nn.Sequential(kind(8), kind(8), kind(8))
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                part.running_mean.normal_(0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def fuse(self, verbose: bool = False) -> Net:
        for block in (self.stem, *self.blocks):
            assert isinstance(block, Branches)
            block.reparameterize()
        return self


class Wrapper(nn.Module):
    """A model that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES, torch.tensor([0, 3]))]


def analyze(model: nn.Module) -> fxprune.Analysis:
    return fxprune.analyze(model, batches())


@pytest.mark.parametrize("kind", [Branches, Returning, TwoSteps])
def test_regions_contain_all_branches_of_a_block_or_none(kind: type[Branches]) -> None:
    analysis = analyze(Net(kind).eval())
    for region in analysis.regions:
        for block in range(3):
            names = {f"blocks.{block}.large.0", f"blocks.{block}.small.0"}
            assert names <= set(region.layers) or not names & set(region.layers)
    whole = {layer for region in analysis.regions for layer in region.layers}
    assert {f"blocks.{block}.large.0" for block in range(3)} <= whole
    rejected = {rejection.name: rejection.reason for rejection in analysis.rejections}
    method = fold_method(kind(3))
    assert f"blocks.0.{method}() folds it and other branches into one layer" in rejected["blocks.0.large"]
    assert f"stem.{method}() folds it" in rejected["stem.small"]


def test_what_the_fold_leaves_may_go_alone() -> None:
    assert "blocks.1.gate" in {region.name for region in analyze(Net().eval()).regions}


@pytest.mark.parametrize("model", [Net(), Wrapper()], ids=["root", "part"])
def test_costs_are_those_of_the_folded_model(model: nn.Module) -> None:
    model = model.eval()
    before = copy.deepcopy(model.state_dict())
    net = model.net if isinstance(model, Wrapper) else model
    assert isinstance(net, Net)
    folded = copy.deepcopy(net).fuse()
    analysis = analyze(model)
    assert analysis.before.flops == flops_of(folded, IMAGES) / 2
    assert analysis.before.params == sum(value.numel() for value in folded.parameters())
    region = next(region for region in analysis.regions if any("blocks.1.large" in layer for layer in region.layers))
    folded.get_submodule("blocks.1").folded = nn.Identity()
    assert analysis.before.flops - region.flops == flops_of(folded, IMAGES) / 2
    assert analysis.before.params - region.params == sum(value.numel() for value in folded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_block_whose_parts_are_graphs_of_their_own_stays_whole() -> None:
    class Eager(Branches):
        def forward(self, x: Tensor) -> Tensor:
            if not bool(x.isfinite().all()):
                raise ValueError("not finite")
            return super().forward(x)

    analysis = analyze(Net(Eager).eval())
    assert not {layer for region in analysis.regions for layer in region.layers} & {
        f"blocks.{block}.{branch}" for block in range(3) for branch in ("large.0", "small.0")
    }
    assert any("reparameterize() folds it" in rejection.reason for rejection in analysis.rejections)


def test_method_that_changes_the_output_folds_nothing() -> None:
    class Forgetful(Branches):
        def reparameterize(self) -> None:
            super().reparameterize()
            assert self.folded is not None
            self.folded.weight.data.zero_()

    model = Net(Forgetful).eval()
    assert find_folded_blocks(model, lambda: model(IMAGES)) == {}


def test_method_that_needs_arguments_is_not_called() -> None:
    class Needy(Branches):
        def reparameterize(self, kernel: Tensor) -> None:  # type: ignore[override]
            raise AssertionError

    assert fold_method(Needy(3)) is None


def test_method_that_fails_is_named_and_the_branches_count_as_they_are() -> None:
    class Broken(Branches):
        def reparameterize(self) -> None:
            raise RuntimeError("no large branch")

    model = Net(Broken).eval()
    with pytest.warns(fxprune.FxpruneWarning, match=r"\.reparameterize\(\) failed \(RuntimeError: no large"):
        analysis = analyze(model)
    assert analysis.before.flops == flops_of(model, IMAGES) / 2
    assert "blocks.0.large" in {region.name for region in analysis.regions}


def test_block_inside_one_that_folds_it_too_is_part_of_the_outer_one() -> None:
    class Outer(nn.Module):
        """The difference of two blocks, which becomes one layer."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Returning(8), Returning(8)
            self.folded: nn.Conv2d | None = None

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) - self.second(x) if self.folded is None else self.folded(x)

        def reparameterize(self) -> None:
            conv, other = self.first.fuse(), self.second.fuse()
            assert isinstance(conv, nn.Conv2d)
            for name, value in conv.named_parameters():
                value.data -= other.get_parameter(name)
            self.folded = conv
            del self.first, self.second

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Outer(), Returning(8)).eval()
    assert set(find_folded_blocks(model, lambda: model(IMAGES))) == {"1", "2"}
