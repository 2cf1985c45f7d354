"""Hostile input: each has its own clear error, and the caller's model is left bit for bit as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.models import detection

import fxprune
from fxprune import BatchError, BudgetError, FxpruneWarning, LossError, ModelError, NoRegionError, SettingError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


class Tiny(nn.Module):
    """A classifier of 5 classes with four removable blocks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def tiny(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny().eval()


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(count: int = 2, batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(pixels(count, 3, 16, 16, seed=i), torch.arange(count) + i) for i in range(batches)]


def squared(model: nn.Module, batch: Any) -> Tensor:
    """A loss of the caller's own."""
    return model(batch[0]).square().mean()


# What the caller owns, before and after ------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that could be changed behind its owner's back, tensors cloned."""
    values = [*model.named_parameters(), *model.named_buffers()]
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "in place": {name: getattr(module, "inplace", None) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {n: [len(getattr(module, hook)) for hook in HOOKS] for n, module in model.named_modules()},
        "tensors": {name: (id(value), value.dtype, value._version) for name, value in values},
        "requires_grad": {name: value.requires_grad for name, value in values},
        "grad": {name: value.grad is None for name, value in values},
        "values": {name: value.detach().clone() for name, value in values},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    old, new = before.pop("values"), after.pop("values")
    assert after == before
    assert old.keys() == new.keys()
    assert [name for name, value in old.items() if not value.is_meta and not torch.equal(value, new[name])] == []


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Hold a block to leave a model, torch's random state and its gradient mode as they were."""
    before, random, gradients = snapshot(model), torch.get_rng_state(), torch.is_grad_enabled()
    yield
    assert_same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled() is gradients


@contextmanager
def refused(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
    """Hold a block to raise an error whose message matches, and to leave the model as it was."""
    with unchanged(model), pytest.raises(error, match=match) as caught:
        yield
    assert isinstance(caught.value, fxprune.FxpruneError)


def removed(pruned: nn.Module) -> list[str]:
    return sorted(region.name for region in fxprune.report(pruned).removed)


class Unread:
    """A loader that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        pytest.fail("the loader was read before the settings were checked")
        yield


# The helper itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        lambda model: model.train(),
        lambda model: model.stem.weight.data.mul_(2),
        lambda model: model.stem.requires_grad_(False),
        lambda model: model.blocks[0].norm.running_mean.add_(1),
        lambda model: model.blocks[0].register_forward_hook(print),
        lambda model: setattr(model.blocks[0].act, "inplace", False),
        lambda model: setattr(model, "fxprune_plans", []),
        lambda model: model(pixels(1, 3, 16, 16)).sum().backward(),
        lambda model: torch.rand(1),
        lambda model: torch.nn.init.zeros_(model.fc.weight),
        lambda model: setattr(model, "fc", copy.deepcopy(model.fc)),
    ],
)
def test_the_snapshot_sees_every_change(harm: Callable[[Any], Any]) -> None:
    model = tiny()
    with torch.random.fork_rng(), pytest.raises(AssertionError), unchanged(model):
        harm(model)


# Budgets and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget", [0, 1, 0.0, 1.0, -0.1, 1.5, 10, float("nan"), float("inf"), "0.1", True, None, [0.1]]
)
def test_a_budget_that_is_no_fraction(budget: Any) -> None:
    model = tiny()
    with refused(model, BudgetError, rf"fraction between 0 and 1 .* got {re.escape(repr(budget))}"):
        fxprune.compile(model, Unread(), budget)


@pytest.mark.parametrize("budget", [np.float64(0.1), np.float32(0.1)])
def test_a_numpy_budget_is_a_number(budget: Any) -> None:
    assert len(removed(fxprune.compile(tiny(), labelled(), budget))) == 1


def test_an_infeasible_budget_says_how_much_could_go() -> None:
    model = tiny()
    with unchanged(model), pytest.raises(BudgetError, match="at most") as caught:
        fxprune.compile(model, labelled(), 0.999)
    share = re.search(r"give ([\d.]+)% at most; ask for less than (0\.\d+)", str(caught.value))
    assert share is not None
    assert float(share[1]) == pytest.approx(100 * float(share[2]), abs=0.11)
    assert len(removed(fxprune.compile(model, labelled(), float(share[2])))) == 4


@pytest.mark.parametrize("criterion", ["gradient", "", None, 3, ["l1"]])
def test_an_unknown_criterion(criterion: Any) -> None:
    model = tiny()
    with refused(model, SettingError, "criterion .* is not known; known: .*grad_delta.*l1.*ablation.*random.*callable"):
        fxprune.compile(model, Unread(), 0.1, criterion=criterion)


@pytest.mark.parametrize("shapes", ["guessed", None, True, ["proved"]])
def test_unknown_shapes(shapes: Any) -> None:
    model = tiny()
    with refused(model, SettingError, "shapes .* is not known; known: 'proved', 'sampled'"):
        fxprune.compile(model, Unread(), 0.1, shapes=shapes)


@pytest.mark.parametrize("cost", ["watts", None, ["flops"]])
def test_an_unknown_cost(cost: Any) -> None:
    model = tiny()
    with refused(model, SettingError, "cost .* is not known; known: .*flops.*params.*blocks"):
        fxprune.compile(model, labelled(), 0.1, cost=cost)


def test_an_unknown_cost_is_refused_before_any_work() -> None:
    with pytest.raises(SettingError, match="cost 'watts' is not known"):
        fxprune.compile(tiny(), Unread(), 0.1, cost="watts")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf"), None, "low"])
def test_a_criterion_that_gives_no_finite_number(score: Any) -> None:
    model = tiny()
    with refused(model, SettingError, r"gave .* for region '?blocks\.0'?.* finite"):
        fxprune.compile(model, labelled(), 0.1, criterion=lambda region, modules: score)


def test_an_error_inside_the_callers_criterion_is_the_callers() -> None:
    model = tiny()

    def criterion(region: Any, modules: Any) -> float:
        raise ZeroDivisionError(region.name)

    with unchanged(model), pytest.raises(ZeroDivisionError, match=r"blocks\.0"):
        fxprune.compile(model, labelled(), 0.1, criterion=criterion)


# Loaders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], (), iter(()), (batch for batch in list[Any]())])
def test_a_loader_without_batches(empty: Any) -> None:
    model = tiny()
    with refused(model, BatchError, "calib_loader yielded no batch; give at least one"):
        fxprune.compile(model, empty, 0.1)


@pytest.mark.parametrize("loader", [pixels(2, 3, 16, 16), {"img": pixels(2, 3, 16, 16)}, "coco.yaml", b"", None, 3])
def test_a_loader_that_is_none(loader: Any) -> None:
    model = tiny()
    with refused(model, BatchError, f"calib_loader must be an iterable of batches, got {type(loader).__name__}"):
        fxprune.compile(model, loader, 0.1)


@pytest.mark.parametrize("criterion", ["grad_delta", "ablation"])
def test_a_generator_is_read_once(criterion: str) -> None:
    model, yields = tiny(), [0]

    def batches() -> Iterator[Any]:
        for batch in labelled(batches=3):
            yields[0] += 1
            yield batch

    generator = batches()
    with unchanged(model):
        pruned = fxprune.compile(model, generator, 0.1, criterion=criterion)
    assert yields == [3]
    assert next(generator, None) is None
    report = fxprune.report(pruned)
    assert (report.settings["batches"], report.settings["images"]) == (3, 6)
    assert removed(pruned) == removed(fxprune.compile(model, labelled(batches=3), 0.1, criterion=criterion))


def test_a_loader_that_can_be_read_again_is_read_once() -> None:
    reads = [0]

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            reads[0] += 1
            return iter(labelled())

    fxprune.analyze(tiny(), Loader(), criterion="ablation")
    assert reads == [1]


@pytest.mark.parametrize("where", [0, 1])
def test_none_among_the_batches(where: int) -> None:
    model, batches = tiny(), list[Any](labelled())
    batches.insert(where, None)
    with refused(model, BatchError, rf"^batch {where}: .*None"):
        fxprune.compile(model, batches, 0.1)


def test_an_error_inside_the_loader_is_the_loaders() -> None:
    model = tiny()

    def batches() -> Iterator[Any]:
        yield labelled()[0]
        raise OSError("image 17 is truncated")

    with unchanged(model), pytest.raises(OSError, match="image 17 is truncated"):
        fxprune.compile(model, batches(), 0.1)


# Batches of a classifier ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(
    "batch",
    [
        {"img": pixels(2, 3, 16, 16)},
        "cat.jpg",
        3,
        np.zeros((2, 3, 16, 16), np.float32),
        pixels(3, 16, 16),
        pixels(16),
        (pixels(2, 3, 16, 16), [1, 2]),
        (pixels(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor([1, 2])),
        (np.zeros((2, 3, 16, 16), np.float32), torch.tensor([1, 2])),
    ],
    ids=["dict", "string", "number", "array", "image", "vector", "list of labels", "triple", "array and labels"],
)
def test_a_form_no_classifier_takes(batch: Any, where: int) -> None:
    model, batches = tiny(), list[Any](labelled())
    batches.insert(where, batch)
    with refused(model, BatchError, rf"^batch {where}: .*Tensor\(N, 3, H, W\), Tensor\(N\) of class indices"):
        fxprune.compile(model, batches, 0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 5]), "labels run from 1 to 5, the model knows 0 to 4"),
        (torch.tensor([-1, 2]), "labels run from -1 to 2, the model knows 0 to 4"),
        (torch.tensor([1, 2, 3]), "2 images but 3 labels"),
        (torch.tensor([1.0, 2.0]), "labels are floating point; give class indices as integers"),
        (torch.rand(2, 4), "4 .*classes|classes.* 4"),
    ],
)
@pytest.mark.parametrize("where", [0, 1])
def test_labels_no_classifier_takes(labels: Tensor, message: str, where: int) -> None:
    model, batches = tiny(), labelled()
    batches.insert(where, (pixels(2, 3, 16, 16), labels))
    with refused(model, BatchError, f"^batch {where}: .*({message})"):
        fxprune.compile(model, batches, 0.1)


def test_images_of_mixed_sizes_for_a_classifier() -> None:
    model = tiny()
    with refused(model, BatchError, r"^batch 0: .*one size .* got \[\(3, 16, 16\), \(3, 16, 24\)\]; resize or pad"):
        fxprune.compile(model, [[pixels(3, 16, 24), pixels(3, 16, 16)]], 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite(value: float) -> None:
    model, batches = tiny(), labelled()
    batches[1][0][1, 2, 3, 4] = value
    with refused(model, BatchError, "^batch 1: an image holds NaN or infinity"):
        fxprune.compile(model, batches, 0.1)


@pytest.mark.parametrize("batch", [pixels(0, 3, 16, 16), [], (pixels(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64))])
def test_a_batch_without_images(batch: Any) -> None:
    model = tiny()
    with refused(model, BatchError, "^batch 0: the batch holds no image"):
        fxprune.compile(model, [batch], 0.1)


def test_images_with_another_number_of_channels() -> None:
    model = tiny()
    with refused(model, BatchError, "^batch 0: .*channels.*[Kk]nown forms"):
        fxprune.compile(model, [(pixels(2, 1, 16, 16), torch.tensor([1, 2]))], 0.1)


@pytest.mark.parametrize(
    "batch",
    [
        (pixels(1, 3, 16, 16), torch.tensor([4])),
        pixels(1, 3, 16, 16),
        [pixels(1, 3, 16, 16)],
        [pixels(3, 16, 16)],
        (pixels(1, 3, 16, 16), torch.full((1, 5), 0.2)),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.tensor([4])),
    ],
    ids=["labelled", "tensor", "list of a batch", "list of an image", "soft labels", "bytes"],
)
def test_a_batch_of_one(batch: Any) -> None:
    model = tiny()
    with unchanged(model):
        pruned = fxprune.compile(model, [batch], 0.1)
    assert len(removed(pruned)) == 1
    assert fxprune.report(pruned).settings["images"] == 1


# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_a_loss_that_is_not_finite(value: float, shown: str, where: int) -> None:
    model, batches = tiny(), [(*batch, 0.0) for batch in labelled()]
    batches[where] = (*batches[where][:2], value)
    with refused(model, LossError, f"^batch {where}: the loss is {shown};"):
        fxprune.compile(model, batches, 0.1, loss=lambda model, batch: squared(model, batch) + batch[2])


@pytest.mark.parametrize("where", [0, 1])
def test_a_gradient_that_is_not_finite(where: int) -> None:
    model, batches = tiny(), [(*batch, i == where) for i, batch in enumerate(labelled())]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = squared(model, batch)
        return value + (value * 0).sqrt() if batch[2] else value  # finite, but its slope at 0 is not

    with refused(model, LossError, f"^batch {where}: the gradient at '.+' is NaN or infinite"):
        fxprune.compile(model, batches, 0.1, loss=loss)


def _slope(model: nn.Module, batch: Any) -> Tensor:
    return squared(model, batch).detach() + torch.zeros((), requires_grad=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: torch.tensor(1.0),
        lambda model, batch: torch.zeros((), requires_grad=True) + 1,
        lambda model, batch: squared(model, batch).detach(),
        _slope,
        lambda model, batch: squared(model, batch) * 0,
        lambda model, batch: next(model.parameters()).square().mean(),
    ],
    ids=["constant", "constant with gradient", "detached", "detached plus a leaf", "times zero", "weight decay"],
)
def test_a_loss_that_does_not_depend_on_the_model(loss: Any) -> None:
    model = tiny()
    with refused(model, LossError, "the loss does not depend on"):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


@pytest.mark.parametrize("criterion", ["grad_delta", "grad_act"])
def test_a_region_whose_gradient_is_zero_throughout_is_not_taken_for_unimportant(criterion: str) -> None:
    """A loss may mask a part of the model on every batch, as detectors do with a level that no box falls on."""

    class Masked(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            stem = self.stem(x)
            seen, unseen = self.blocks[1](self.blocks[0](stem)), self.blocks[3](self.blocks[2](stem))
            return torch.cat([self.fc(seen.mean((2, 3))), self.fc(unseen.mean((2, 3)))], 1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Masked().eval()
    with unchanged(model):
        analysis = fxprune.analyze(
            model,
            labelled(),
            criterion=criterion,
            loss=lambda model, batch: (model(batch[0]).square() * torch.tensor([1.0, 0.0]).repeat_interleave(5)).mean(),
        )
    assert {"blocks.0", "blocks.1"} <= {region.name for region in analysis.regions}
    assert all(region.score > 0 for region in analysis.regions)
    refused = {rejection.name for rejection in analysis.rejections if "no gradient reached it" in rejection.reason}
    assert {"blocks.2", "blocks.3"} <= refused


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"^batch 0: the loss has shape \(2, 5\); return a scalar"),
        (lambda model, batch: float(squared(model, batch)), r"^batch 0: .*returned float, not a scalar tensor"),
        (lambda model, batch: None, r"^batch 0: .*returned NoneType, not a scalar tensor"),
        (lambda model, batch: {"loss": squared(model, batch)}, r"^batch 0: .*returned dict, not a scalar tensor"),
    ],
)
def test_a_loss_that_is_no_scalar(loss: Any, message: str) -> None:
    model = tiny()
    with refused(model, LossError, message):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


def test_a_loss_of_one_element_is_a_scalar() -> None:
    assert removed(fxprune.compile(tiny(), labelled(), 0.1, loss=lambda m, b: squared(m, b).reshape(1))) == removed(
        fxprune.compile(tiny(), labelled(), 0.1, loss=squared)
    )


@pytest.mark.parametrize("loss", ["cross_entropy", 3, pixels(1)])
def test_a_loss_that_is_not_callable(loss: Any) -> None:
    model = tiny()
    with refused(model, SettingError, rf"loss must be callable\(model, batch\) .* got {type(loss).__name__}"):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


def test_a_loss_that_fails_names_its_batch_and_its_error() -> None:
    model = tiny()
    with refused(model, BatchError, "^batch 0: .*KeyError: 'img'"):
        fxprune.compile(model, labelled(), 0.1, loss=lambda model, batch: dict[str, Tensor]()["img"])


def test_an_exception_of_the_callers_own_comes_through_the_loss() -> None:
    class Stop(Exception):
        pass

    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise Stop

    model = tiny()
    with unchanged(model), pytest.raises(Stop):
        fxprune.compile(model, labelled(), 0.1, loss=loss)


# Models --------------------------------------------------------------------------------------------------------------


def test_frozen_parameters_give_the_same_plan() -> None:
    model, frozen = tiny(), tiny().requires_grad_(False)
    with unchanged(frozen):
        analysis = fxprune.analyze(frozen, labelled())
        pruned = fxprune.apply(frozen, analysis.plan(0.2))
    assert analysis == fxprune.analyze(model, labelled())
    assert all(region.score > 0 for region in analysis.regions)
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    assert all(parameter.requires_grad for parameter in fxprune.apply(model, analysis.plan(0.2)).parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(mode: Any) -> None:
    model, batches = tiny(), labelled()
    with mode(), unchanged(model):
        pruned = fxprune.compile(model, batches, 0.1)
    assert removed(pruned) == removed(fxprune.compile(model, labelled(), 0.1))
    pruned(pixels(1, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


@pytest.mark.parametrize("loss", [None, squared], ids=["cross entropy", "the caller's"])
def test_batches_made_in_inference_mode(loss: Any) -> None:
    model = tiny()
    with torch.inference_mode():
        batches = [(images.clone(), labels.clone()) for images, labels in labelled()]
    assert batches[0][0].is_inference()
    with unchanged(model):
        pruned = fxprune.compile(model, batches, 0.1, loss=loss)
    assert removed(pruned) == removed(fxprune.compile(model, labelled(), 0.1, loss=loss))


def test_a_model_in_train_mode_comes_back_in_train_mode() -> None:
    model = tiny().train()
    model.get_submodule("blocks.1").eval()
    with unchanged(model):
        pruned = fxprune.compile(model, labelled(), 0.1)
    assert removed(pruned) == removed(fxprune.compile(tiny(), labelled(), 0.1))
    modes = {name: module.training for name, module in model.named_modules()}
    layers = {name: module for name, module in pruned.named_modules() if not any(True for _ in module.children())}
    assert {name: module.training for name, module in layers.items()} == {name: modes[name] for name in layers}
    assert pruned.training


@pytest.mark.parametrize("place", ["blocks", "blocks.1", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_on_a_container_is_named(place: str, kind: str) -> None:
    model = tiny()
    getattr(model.get_submodule(place), kind)(lambda *given: None)
    shown = f"^{place} carries hooks" if place else "^the model itself carries hooks"
    with unchanged(model):
        plan = fxprune.analyze(model, labelled()).plan(0.1)
        with pytest.warns(FxpruneWarning, match=shown):
            pruned = fxprune.apply(model, plan)
    assert removed(pruned) == removed(fxprune.compile(tiny(), labelled(), 0.1))


def test_a_hook_on_a_layer_that_stays_stays() -> None:
    model, seen = tiny(), list[tuple[int, ...]]()
    model.get_submodule("stem").register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with unchanged(model):
        pruned = fxprune.compile(model, labelled(), 0.1)
    seen.clear()
    pruned(pixels(1, 3, 16, 16))
    assert seen == [(1, 8, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_plan_of_single_precision(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    single = copy.deepcopy(model).float()
    with unchanged(model):
        analysis = fxprune.analyze(model, labelled())
        pruned = fxprune.apply(model, analysis.plan(0.2))
    assert analysis == fxprune.analyze(single, labelled())
    assert {value.dtype for value in pruned.state_dict().values() if value.is_floating_point()} == {dtype}
    assert pruned(pixels(1, 3, 16, 16).to(dtype)).dtype == dtype


def test_a_graph_module_is_a_model_like_any_other() -> None:
    model = tiny()
    traced = fx.symbolic_trace(model)
    with unchanged(traced), unchanged(model):
        pruned = fxprune.compile(traced, labelled(), 0.2)
    expected = fxprune.compile(model, labelled(), 0.2)
    assert removed(pruned) == removed(expected)
    assert pruned.state_dict().keys() == expected.state_dict().keys()
    image = pixels(1, 3, 16, 16)
    assert torch.equal(pruned(image), expected(image))


def test_a_pruned_model_can_be_pruned_again() -> None:
    once = fxprune.compile(tiny(), labelled(), 0.1)
    with unchanged(once):
        twice = fxprune.compile(once, labelled(), 0.1)
    assert len(removed(once)) == 1
    assert len(removed(twice)) == 2
    assert twice(pixels(1, 3, 16, 16)).shape == (1, 5)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.compile, r"wrapped in OptimizedModule: pass model\._orig_mod and compile the result again"),
        (nn.DataParallel, r"wrapped in DataParallel: pass model\.module and wrap the result again"),
        (lambda model: cast(Any, torch.jit).trace(model, pixels(1, 3, 16, 16)), "wrapped in .*: pass the eager model"),
    ],
    ids=["torch.compile", "DataParallel", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_wrapped_model(wrap: Any, message: str) -> None:
    model = tiny()
    wrapper = wrap(model)
    plan = fxprune.analyze(model, labelled()).plan(0.1)
    with refused(model, ModelError, message):
        fxprune.compile(wrapper, Unread(), 0.1)
    with refused(model, ModelError, message):
        fxprune.apply(wrapper, plan)
    with refused(model, ModelError, message):
        fxprune.report(wrapper)


@pytest.mark.parametrize("thing", ["yolov8n.pt", None, {}, Tiny, functional.relu])
def test_something_that_is_no_module(thing: Any) -> None:
    with pytest.raises(ModelError, match=f"expected a torch.nn.Module, got {type(thing).__name__}"):
        fxprune.compile(thing, Unread(), 0.1)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = Tiny()
    with refused(model, ModelError, "weights are on the meta device; load them first"):
        fxprune.compile(model, Unread(), 0.1)


def test_a_model_whose_weights_are_only_buffers_without_values() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False, device="meta"), nn.Flatten())
    with refused(model, ModelError, "meta device"):
        fxprune.compile(model, labelled(), 0.1)


def test_a_model_that_cannot_be_copied() -> None:
    model = tiny()
    model.last = model(pixels(1, 3, 16, 16))
    with refused(model, ModelError, "Tiny cannot be copied .*; fxprune works on a copy"):
        fxprune.compile(model, labelled(), 0.1)


def test_a_model_with_nothing_removable() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with unchanged(model), pytest.raises(NoRegionError, match="nothing in Sequential can be removed:") as caught:
        fxprune.compile(model, labelled(), 0.1)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["0", "3"]
    assert all(re.search(r"it turns \w+ into \w+", line) for line in lines)


def test_a_model_without_weights() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with refused(model, ModelError, "no part of Sequential with weights could be traced"):
        fxprune.compile(model, labelled(), 0.1)


def test_a_model_of_no_known_kind_needs_a_loss() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 1))
    with refused(model, ModelError, r"returned a tensor of shape \(2, 5, 16, 16\), not logits .* give a loss"):
        fxprune.compile(model, labelled(), 0.1)
    assert len(removed(fxprune.compile(model, labelled(), 0.1, loss=squared))) == 1


# Interruptions -------------------------------------------------------------------------------------------------------


def halfway() -> nn.Module:
    """A model in a state that defaults would not restore: mixed modes, some weights frozen, hooks."""
    model = tiny().train()
    model.get_submodule("blocks.1").eval()
    model.get_submodule("blocks.2").requires_grad_(False)
    model.get_submodule("stem").register_forward_hook(lambda *given: None)
    return model


def test_an_interrupt_in_the_loader() -> None:
    model = halfway()

    def batches() -> Iterator[Any]:
        yield labelled()[0]
        torch.rand(1)
        raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        fxprune.compile(model, batches(), 0.1)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_an_interrupt_in_the_loss(call: int) -> None:
    """Call by call: while the model is observed, held to its graphs, counted, scored, and ablated."""
    model, calls = halfway(), [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(1)
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return squared(model, batch)

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        fxprune.compile(model, labelled(), 0.1, loss=loss, criterion="ablation")
    assert calls == [call]
    with unchanged(model):
        assert len(fxprune.analyze(model, labelled(), loss=squared).regions) >= 4


def test_a_run_that_succeeds_leaves_randomness_alone() -> None:
    model = halfway()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squared(model, batch) + 0 * torch.rand(())

    with unchanged(model):
        fxprune.compile(model, labelled(), 0.1, loss=loss, criterion="random")


# Torchvision detectors -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ssd() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    return built.eval()


@pytest.fixture(scope="module")
def retinanet() -> nn.Module:
    """Torchvision's own class around a small backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), *(Block(8) for _ in range(3)))
        backbone.out_channels = 8  # type: ignore[assignment]
        anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
        head = detection.retinanet.RetinaNetHead(8, 2, 5)
        built = detection.RetinaNet(backbone, 5, min_size=64, max_size=96, anchor_generator=anchors, head=head)
    return built.eval()


def target(label: int = 1, box: tuple[float, ...] = (8.0, 8.0, 40.0, 40.0)) -> dict[str, Tensor]:
    return {"boxes": torch.tensor([box]), "labels": torch.tensor([label])}


def no_boxes() -> dict[str, Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize(
    "batch",
    [
        {"img": pixels(1, 3, 64, 64)},
        "cat.jpg",
        3,
        np.zeros((1, 3, 64, 64), np.float32),
        [np.zeros((3, 64, 64), np.float32)],
        pixels(3, 64, 64),
        (pixels(1, 3, 64, 64), torch.tensor([1])),
        ([pixels(3, 64, 64)], [{"boxes": torch.zeros(0, 4)}]),
        ([pixels(3, 64, 64)], [{"bbox": torch.zeros(0, 4), "category_id": torch.zeros(0)}]),
        ([pixels(3, 64, 64)], [[{"bbox": [1, 2, 3, 4], "category_id": 1}]]),
    ],
    ids=["dict", "string", "number", "array", "arrays", "image", "class labels", "no labels", "other keys", "coco"],
)
def test_a_form_no_torchvision_detector_takes(ssd: nn.Module, batch: Any) -> None:
    with refused(ssd, BatchError, r"^batch 0: .*list of Tensor\(3, H, W\), list of dict\(boxes="):
        fxprune.compile(ssd, [batch], 0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (target(-1), "label -1 is negative"),
        (target(box=(40, 8, 40, 40)), "a box has no positive width and height"),
        (target(box=(40, 8, 8, 40)), "a box has no positive width and height"),
        (target(box=(float("nan"), 8, 40, 40)), "NaN|no positive width and height"),
        (target(box=(8, 8, float("inf"), 40)), "NaN|infinit"),
        (target(box=(8, 8, 40, 40, 1)), r"boxes .*\(1, 5\)"),
        (target() | {"labels": torch.tensor([1, 2])}, "a target has 1 boxes but 2 labels"),
        (target() | {"boxes": "everywhere"}, "boxes"),
        (target() | {"labels": ["cat"]}, "labels"),
    ],
    ids=["negative", "no width", "corners swapped", "NaN", "infinite", "five", "counts", "text", "names"],
)
def test_targets_no_torchvision_detector_takes(ssd: nn.Module, labels: Any, message: str) -> None:
    with refused(ssd, BatchError, f"^batch 0: .*({message})"):
        fxprune.compile(ssd, [([pixels(3, 64, 64)], [labels])], 0.1)


def test_more_images_than_targets(ssd: nn.Module) -> None:
    with refused(ssd, BatchError, "^batch 0: 2 images but 1 targets"):
        fxprune.compile(ssd, [([pixels(3, 64, 64)] * 2, [target()])], 0.1)


@pytest.mark.parametrize(("name", "label"), [("ssd", 5), ("retinanet", 5), ("retinanet", 91)])
def test_labels_a_torchvision_detector_does_not_know(name: str, label: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    batch = ([pixels(3, 64, 64)] * 2, [target(1), target(label)])
    with refused(model, BatchError, f"^batch 0: .*labels run from 1 to {label}"):
        fxprune.compile(model, [batch], 0.1)


def test_an_image_that_is_not_finite_for_a_torchvision_detector(ssd: nn.Module) -> None:
    image = pixels(3, 64, 64)
    image[0, 0, 0] = float("nan")
    with refused(ssd, BatchError, "^batch 0: an image holds NaN or infinity"):
        fxprune.compile(ssd, [([pixels(3, 64, 64), image], [target(), target()])], 0.1)


def test_a_torchvision_batch_without_images(ssd: nn.Module) -> None:
    with refused(ssd, BatchError, "^batch 0: the batch holds no image"):
        fxprune.compile(ssd, [([], [])], 0.1)


def test_a_label_out_of_range_in_a_later_batch(retinanet: nn.Module) -> None:
    batches = [([pixels(3, 64, 64)], [target(4)]), ([pixels(3, 64, 64)], [target(7)])]
    with refused(retinanet, BatchError, "^batch 1: .*labels run from 7 to 7"):
        fxprune.compile(retinanet, batches, 0.1)


@pytest.mark.parametrize(
    "batch",
    [
        ([pixels(3, 64, 96), pixels(3, 80, 64)], [target(), target(2)]),
        ([pixels(3, 64, 64)], [target(4)]),
        ([pixels(3, 64, 64), pixels(3, 64, 64)], [target(), no_boxes()]),
        ([pixels(3, 64, 64)], [no_boxes()]),
        ([pixels(3, 64, 64)], [{"boxes": torch.zeros(0), "labels": torch.zeros(0)}]),
        [pixels(3, 64, 64)],
        pixels(1, 3, 64, 64),
        ((pixels(3, 64, 64),), ({"boxes": [[8, 8, 40, 40]], "labels": [1]},)),
    ],
    ids=["mixed sizes", "one", "one without boxes", "no boxes", "flat", "images", "tensor", "lists"],
)
def test_batches_a_torchvision_detector_takes(retinanet: nn.Module, batch: Any) -> None:
    with unchanged(retinanet):
        analysis = fxprune.analyze(retinanet, [batch])
    assert analysis.settings["images"] == (2 if len(batch) == 2 and len(batch[0]) == 2 else 1)
    assert {"backbone.1", "backbone.2", "backbone.3"} <= {region.name for region in analysis.regions if region.score}


# Ultralytics ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yolo() -> Any:
    ultralytics = pytest.importorskip("ultralytics")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ultralytics.YOLO("yolov8n.yaml")


def boxes(**changed: Any) -> dict[str, Any]:
    batch = {
        "img": pixels(2, 3, 64, 64),
        "cls": torch.tensor([[3.0], [7.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.4, 0.5, 0.2, 0.6]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    return {key: value for key, value in (batch | changed).items() if value is not None}


@pytest.mark.parametrize(
    "batch",
    [
        {"images": pixels(1, 3, 64, 64)},
        "cat.jpg",
        3,
        np.zeros((1, 3, 64, 64), np.float32),
        pixels(3, 64, 64),
        (pixels(1, 3, 64, 64), torch.tensor([1])),
        ([pixels(3, 64, 64)], [target()]),
        boxes(cls=None),
        boxes(img=["cat.jpg", "dog.jpg"]),
    ],
    ids=["other keys", "string", "number", "array", "image", "class labels", "torchvision", "no cls", "paths"],
)
def test_a_form_no_ultralytics_model_takes(yolo: Any, batch: Any) -> None:
    with refused(yolo, BatchError, r"^batch 0: .*dict\(img=Tensor\(N, 3, H, W\), cls=Tensor\(n, 1\), bboxes="):
        fxprune.compile(yolo, [batch], 0.1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (boxes(cls=torch.tensor([[3.0], [80.0]])), "cls runs from 3 to 80, the model knows 0 to 79"),
        (boxes(cls=torch.tensor([[-1.0], [3.0]])), "cls runs from -1 to 3, the model knows 0 to 79"),
        (boxes(cls=torch.tensor([[3.0]])), "1 cls, 2 bboxes and 2 batch_idx should be equally many"),
        (boxes(batch_idx=torch.tensor([0.0, 2.0])), "batch_idx runs .*to 2, the batch has 2 images"),
        (boxes(batch_idx=torch.tensor([-1.0, 1.0])), "batch_idx runs from -1 .*the batch has 2 images"),
        (boxes(bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]] * 2)), r"bboxes leave \[0, 1\]"),
        (boxes(bboxes=torch.tensor([[0.5, 0.5, 0.0, 0.4]] * 2)), "a box has no positive width and height"),
        (boxes(bboxes=torch.tensor([[0.5, 0.5, float("nan"), 0.4]] * 2)), "NaN"),
        (boxes(bboxes=torch.tensor([[0.5, 0.5, 0.2, 0.4, 0.1]] * 2)), r"bboxes .*\(2, 5\)"),
        (boxes(cls=[3, 7]), "cls .*list"),
        (boxes(bboxes=[[0.5, 0.5, 0.2, 0.2]] * 2), "bboxes .*list"),
        (boxes(img=[pixels(3, 64, 96), pixels(3, 64, 64)]), r"one size .* got \[\(3, 64, 64\), \(3, 64, 96\)\]"),
        (boxes(img=torch.full((2, 3, 64, 64), float("nan"))), "an image holds NaN or infinity"),
        (boxes(img=pixels(0, 3, 64, 64)), "the batch holds no image"),
    ],
    ids=[
        *("label too high", "label negative", "counts", "index too high", "index negative", "pixels", "no width"),
        *("NaN box", "five", "list of cls", "list of boxes", "mixed sizes", "NaN image", "no image"),
    ],
)
def test_targets_no_ultralytics_model_takes(yolo: Any, batch: Any, message: str) -> None:
    with refused(yolo, BatchError, f"^batch 0: .*{message}"):
        fxprune.compile(yolo, [batch], 0.1)


def test_an_ultralytics_batch_of_one_and_one_without_boxes(yolo: Any) -> None:
    empty = boxes(cls=torch.zeros(0, 1), bboxes=torch.zeros(0, 4), batch_idx=torch.zeros(0))
    one = boxes(img=pixels(1, 3, 64, 64), batch_idx=torch.zeros(2))
    with unchanged(yolo):
        analysis = fxprune.analyze(yolo, [empty, one])
    assert (analysis.settings["images"], analysis.settings["batches"]) == (3, 2)
    scores = {region.name: region.score for region in analysis.regions if not region.name.startswith("model.22")}
    assert len(scores) > 20
    assert min(scores.values()) > 0
