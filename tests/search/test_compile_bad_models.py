"""Models that cannot be analyzed as given, and unusual models that can."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import fxprune
from fxprune import ModelError, NoRegionError
from tests.helpers.hostile import Unread, assert_refused, assert_unchanged, removed
from tests.helpers.models import Tiny, labelled, pixels, squared, tiny

# Models --------------------------------------------------------------------------------------------------------------


def test_frozen_parameters_give_the_same_plan() -> None:
    model, frozen = tiny(), tiny().requires_grad_(False)
    with assert_unchanged(frozen):
        analysis = fxprune.analyze(frozen, labelled())
        pruned = fxprune.apply(frozen, analysis.plan(0.2))
    assert analysis == fxprune.analyze(model, labelled())
    assert all(region.score > 0 for region in analysis.regions)
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    assert all(parameter.requires_grad for parameter in fxprune.apply(model, analysis.plan(0.2)).parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_of_the_caller_does_not_matter(mode: Any) -> None:
    model, batches = tiny(), labelled()
    with mode(), assert_unchanged(model):
        pruned = fxprune.compile(model, batches, 0.1)
    assert removed(pruned) == removed(fxprune.compile(model, labelled(), 0.1))
    pruned(pixels(1, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


@pytest.mark.parametrize("loss", [None, squared], ids=["cross entropy", "the caller's"])
def test_batches_made_in_inference_mode_work(loss: Any) -> None:
    model = tiny()
    with torch.inference_mode():
        batches = [(images.clone(), labels.clone()) for images, labels in labelled()]
    assert batches[0][0].is_inference()
    with assert_unchanged(model):
        pruned = fxprune.compile(model, batches, 0.1, loss=loss)
    assert removed(pruned) == removed(fxprune.compile(model, labelled(), 0.1, loss=loss))


def test_model_in_train_mode_is_returned_in_train_mode() -> None:
    model = tiny().train()
    model.get_submodule("blocks.1").eval()
    with assert_unchanged(model):
        pruned = fxprune.compile(model, labelled(), 0.1)
    assert removed(pruned) == removed(fxprune.compile(tiny(), labelled(), 0.1))
    modes = {name: module.training for name, module in model.named_modules()}
    layers = {name: module for name, module in pruned.named_modules() if not any(True for _ in module.children())}
    assert {name: module.training for name, module in layers.items()} == {name: modes[name] for name in layers}
    assert pruned.training


@pytest.mark.parametrize("place", ["blocks", "blocks.1", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hook_on_a_container_stays(place: str, kind: str, recwarn: pytest.WarningsRecorder) -> None:
    model, seen = tiny(), list[str]()
    getattr(model.get_submodule(place), kind)(lambda *given: seen.append(place))
    with assert_unchanged(model):
        plan = fxprune.analyze(model, labelled()).plan(0.1)
        pruned = fxprune.apply(model, plan)
    assert removed(pruned) == removed(fxprune.compile(tiny(), labelled(), 0.1))
    assert place not in removed(pruned)
    assert not [warning for warning in recwarn.list if issubclass(warning.category, fxprune.FxpruneWarning)]
    seen.clear()
    pruned(pixels(1, 3, 16, 16).requires_grad_()).sum().backward()
    assert set(seen) == {place}


def test_hook_on_a_removed_block_is_named() -> None:
    model = tiny()
    plan = fxprune.analyze(model, labelled()).plan(0.1)
    gone = plan.removed[0].name
    model.get_submodule(gone).register_forward_hook(lambda *given: None)
    with pytest.warns(fxprune.FxpruneWarning, match=f"hooks of {gone} no longer run"):
        pruned = fxprune.apply(model, plan)
    assert isinstance(pruned.get_submodule(gone), torch.nn.Identity)


def test_hook_on_a_remaining_layer_is_kept() -> None:
    model, seen = tiny(), list[tuple[int, ...]]()
    model.get_submodule("stem").register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with assert_unchanged(model):
        pruned = fxprune.compile(model, labelled(), 0.1)
    seen.clear()
    pruned(pixels(1, 3, 16, 16))
    assert seen == [(1, 8, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_same_plan(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    single = copy.deepcopy(model).float()
    with assert_unchanged(model):
        analysis = fxprune.analyze(model, labelled())
        pruned = fxprune.apply(model, analysis.plan(0.2))
    assert analysis == fxprune.analyze(single, labelled())
    assert {value.dtype for value in pruned.state_dict().values() if value.is_floating_point()} == {dtype}
    assert pruned(pixels(1, 3, 16, 16).to(dtype)).dtype == dtype


def test_graph_module_can_be_pruned() -> None:
    model = tiny()
    traced = fx.symbolic_trace(model)
    with assert_unchanged(traced), assert_unchanged(model):
        pruned = fxprune.compile(traced, labelled(), 0.2)
    expected = fxprune.compile(model, labelled(), 0.2)
    assert removed(pruned) == removed(expected)
    assert pruned.state_dict().keys() == expected.state_dict().keys()
    image = pixels(1, 3, 16, 16)
    assert torch.equal(pruned(image), expected(image))


def test_pruned_model_can_be_pruned_again() -> None:
    once = fxprune.compile(tiny(), labelled(), 0.1)
    with assert_unchanged(once):
        twice = fxprune.compile(once, labelled(), 0.1)
    assert len(removed(once)) == 1
    assert len(removed(twice)) == 2
    assert twice(pixels(1, 3, 16, 16)).shape == (1, 5)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.compile, r"OptimizedModule: pass model\._orig_mod"),
        (nn.DataParallel, r"DataParallel: pass model\.module"),
        (lambda model: cast(Any, torch.jit).trace(model, pixels(1, 3, 16, 16)), "pass the eager model"),
    ],
    ids=["torch.compile", "DataParallel", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_wrapped_model_is_refused(wrap: Any, message: str) -> None:
    model = tiny()
    wrapper = wrap(model)
    plan = fxprune.analyze(model, labelled()).plan(0.1)
    with assert_refused(model, ModelError, message):
        fxprune.compile(wrapper, Unread(), 0.1)
    with assert_refused(model, ModelError, message):
        fxprune.apply(wrapper, plan)
    with assert_refused(model, ModelError, message):
        fxprune.report(wrapper)


@pytest.mark.parametrize("thing", ["yolov8n.pt", None, {}, Tiny, functional.relu])
def test_object_that_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(ModelError, match=f"expected a torch.nn.Module, got {type(thing).__name__}"):
        fxprune.compile(thing, Unread(), 0.1)


def test_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = Tiny()
    with assert_refused(model, ModelError, "meta device; load"):
        fxprune.compile(model, Unread(), 0.1)


def test_model_with_buffers_on_the_meta_device_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False, device="meta"), nn.Flatten())
    with assert_refused(model, ModelError, "meta device"):
        fxprune.compile(model, labelled(), 0.1)


def test_model_that_cannot_be_copied_is_refused() -> None:
    model = tiny()
    model.last = model(pixels(1, 3, 16, 16))
    with assert_refused(model, ModelError, "Tiny cannot be copied"):
        fxprune.compile(model, labelled(), 0.1)


def test_model_without_removable_region_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with assert_unchanged(model), pytest.raises(NoRegionError, match="nothing in Sequential") as caught:
        fxprune.compile(model, labelled(), 0.1)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["0", "3"]
    assert all(re.search(r"it turns \w+ into \w+", line) for line in lines)


def test_model_without_weights_is_refused() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with assert_refused(model, ModelError, "Sequential .*could be traced"):
        fxprune.compile(model, labelled(), 0.1)


def test_model_of_unknown_kind_needs_a_loss() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 1))
    with assert_refused(model, ModelError, r"\(2, 5, 16, 16\), not logits .*give a loss"):
        fxprune.compile(model, labelled(), 0.1)
    assert len(removed(fxprune.compile(model, labelled(), 0.1, loss=squared))) == 1
