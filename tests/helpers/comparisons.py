"""Comparisons of the outputs, boxes and gradients of two models."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from tests.helpers.cases import Case


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_alike(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Hold tensors to others, relative to the largest value of each; they are not all zero. Boxes in any order."""
    if isinstance(expected, list) and expected and isinstance(expected[0], dict):
        for first, second in zip(found, expected, strict=True):
            assert_same_boxes(first, second, 10 * tolerance, share=0.995)
        return
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    largest = [float(second.detach().abs().max()) if second.numel() else 0.0 for _, second in pairs]
    assert max(largest) > 1e-3
    for (first, second), scale in zip(pairs, largest, strict=True):
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance * scale)


def assert_same_boxes(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, share: float) -> None:
    """Find a share of the boxes again, in any order: random scores are close, and which goes first is chance."""
    shapes = [{name: value.shape for name, value in boxes.items()} for boxes in (found, expected)]
    assert shapes[0] == shapes[1]
    assert len(found["boxes"]) >= 100
    near = torch.cdist(found["boxes"], expected["boxes"]) < tolerance * expected["boxes"].max()
    near &= found["labels"][:, None] == expected["labels"]
    near &= (found["scores"][:, None] - expected["scores"]).abs() < tolerance * expected["scores"].max()
    assert min(float(near.any(side).float().mean()) for side in (0, 1)) > share


def trained(case: Case, model: nn.Module, run: Any = None) -> nn.Module:
    """Go one step backward from the model's own loss, through `run` if it is not the model; returns the model."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    run = model if run is None else run
    if case.system.family == "classifier":
        loss = functional.cross_entropy(run(case.batch[0]), case.batch[1])
    elif case.system.family == "torchvision":
        loss = sum(run(*copy.deepcopy(case.batch)).values())
    else:
        from fxprune.adapters.ultralytics.adapter import prepare

        prepare(model)
        loss = run(dict(case.batch))[0].sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return model


def assert_trained_alike(found: nn.Module, expected: nn.Module) -> None:
    """Hold gradients and running statistics to those of a model with the same weights or fewer; the rest has none."""
    wanted = {name: parameter.grad for name, parameter in expected.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in found.named_parameters()}
    assert {name for name, value in gradients.items() if value is not None} == {
        name for name, value in wanted.items() if value is not None
    }
    assert_alike({name: gradients[name] for name in wanted}, wanted)
    statistics, buffers = dict(expected.named_buffers()), dict(found.named_buffers())
    assert_alike({name: buffers[name] for name in statistics}, statistics)
