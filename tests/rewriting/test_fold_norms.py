"""Norms folded into convolutions: the same outputs, and no foldable norm is left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision import models
from torchvision.ops import FrozenBatchNorm2d

import fxprune
from fxprune import ModelError, Plan, StorageError
from fxprune.passes.fold_batchnorm import fold_batchnorm
from tests.helpers.concatenations import traced
from tests.helpers.models import Detector, build, pixels

EXACT = 1e-12


def norms(model: nn.Module) -> int:
    return sum("Norm" in type(module).__name__ for module in model.modules())


def varied(model: Any) -> Any:
    """In float64 and eval mode, with statistics and weights of its own in every norm."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
    return model.double().eval()


def image(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    rank = next(value.ndim for value in model.parameters() if value.ndim > 2)
    return torch.randn(2, 4, *[6] * (rank - 2)).to(dtype)


def distance(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    assert first.dtype == second.dtype
    return float((first - second).detach().abs().max())


class Sum(nn.Module):
    """Calls a convolution and norms in a way of its own."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU()),
    "2d": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "2d without bias": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps=0.1)),
    "3d": lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)),
    "fixed": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6)),
    "no weights": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "one norm for two": lambda: Sum(lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), other=nn.Conv2d(4, 4, 1)),
}
LEFT: dict[str, Callable[[], nn.Module]] = {
    "grouped, transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "by group": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)),
    "no statistics": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
    "after an activation": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),
    "read elsewhere": lambda: Sum(lambda m, x: (y := m.conv(x)) + m.norm(y)),
    "called twice": lambda: Sum(lambda m, x: m.norm(m.conv(x)) + m.other(m.conv(2 * x)), other=nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_fold_batchnorm_folds_into_the_convolution_before(name: str) -> None:
    model = varied(FOLDED[name]())
    kept = copy.deepcopy(model.state_dict())
    gm = traced(model)
    assert norms(gm) == 1
    folded = fxprune.fold_norms(gm)
    assert norms(folded) == 0
    x = image(model)
    assert distance(folded(x), model(x)) < EXACT
    assert not any("norm" in key for key in folded.state_dict())
    assert all(torch.equal(value, kept[key]) for key, value in gm.state_dict().items())


@pytest.mark.parametrize("name", LEFT)
def test_fold_norms_keeps_norms_that_cannot_be_folded(name: str) -> None:
    model = varied(LEFT[name]())
    folded = fxprune.fold_norms(fx.symbolic_trace(model))
    x = image(model)
    assert norms(folded) == norms(model) > 0
    assert torch.equal(folded(x), model(x))


def test_fold_batchnorm_folds_a_shared_norm_in_both_graphs() -> None:
    shared = nn.BatchNorm2d(4)
    parts = [traced(nn.Sequential(nn.Conv2d(4, 4, 1), shared)) for _ in range(2)]
    model = varied(nn.Sequential(*parts))
    folded = fxprune.fold_norms(model)
    assert norms(folded) == 0
    x = image(model)
    assert distance(folded(x), model(x)) < EXACT


def test_fold_batchnorm_keeps_norms_in_train_mode() -> None:
    gm = fx.symbolic_trace(varied(FOLDED["2d"]()).train())
    assert not fold_batchnorm(gm).modified
    assert fold_batchnorm(gm.eval()).modified


def test_fold_batchnorm_keeps_layers_with_hooks() -> None:
    for index in range(2):
        model = varied(FOLDED["2d"]())
        model[index].register_forward_hook(lambda *_: None)
        assert not fold_batchnorm(fx.symbolic_trace(model)).modified


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_fold_batchnorm_in_half_precision_rounds_once(dtype: torch.dtype, rounding: float) -> None:
    model = varied(FOLDED["2d without bias"]()).to(dtype)
    x = image(model, dtype)
    folded: Any = fxprune.fold_norms(fx.symbolic_trace(model))
    assert distance(folded(x), model(x)) < rounding
    conv, norm = (copy.deepcopy(layer).float() for layer in model)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    exact = conv.weight * scale[:, None, None, None]
    step = torch.finfo(dtype).eps * exact.abs()
    assert bool(((folded.get_parameter("0.weight").float() - exact).abs() <= step / 2 * 1.01).all())


def test_fold_batchnorm_keeps_memory_format_and_requires_grad() -> None:
    model = varied(FOLDED["2d"]()).to(memory_format=torch.channels_last)
    for learns in (True, False):
        model[0].requires_grad_(learns).bias = None
        folded = fxprune.fold_norms(fx.symbolic_trace(model))
        assert folded.get_parameter("0.weight").stride() == model[0].weight.stride()
        assert {parameter.requires_grad for parameter in folded.parameters()} == {learns}


# Pruned models -------------------------------------------------------------------------------------------------------


def test_fold_norms_of_a_pruned_classifier_keeps_outputs(pruned_tiny: nn.Module, tmp_path: Path) -> None:
    x = pixels(3, 3, 16, 16, seed=9).double()
    pruned = copy.deepcopy(pruned_tiny).double().train()
    folded = fxprune.fold_norms(pruned)
    assert norms(folded) == 0 < norms(pruned)
    assert pruned.training
    assert not any(module.training for module in folded.modules())
    expected = pruned.eval()(x)
    assert distance(folded(x), expected) < EXACT
    assert distance(copy.deepcopy(folded)(x), expected) < EXACT
    assert distance(torch.export.export(folded, (x,)).module()(x), expected) < EXACT
    assert fxprune.report(folded).to_dict() == fxprune.report(pruned).to_dict()
    with pytest.raises(StorageError, match="changed after pruning"):
        fxprune.save(folded, tmp_path / "folded")


def test_fold_norms_of_a_pruned_detector_reaches_all_islands(detector: nn.Module, detector_plan: Plan) -> None:
    pruned = fxprune.apply(detector, detector_plan).double()
    folded = fxprune.fold_norms(pruned)
    assert type(folded) is Detector
    assert norms(folded) == 0 < norms(pruned)
    x = pixels(3, 3, 16, 16, seed=9).double()
    assert distance(folded(x), pruned(x)) < EXACT


def test_fold_norms_accepts_a_traced_network() -> None:
    model = varied(models.resnet18(weights=None, num_classes=5))
    folded = fxprune.fold_norms(fx.symbolic_trace(model))
    assert (norms(model), norms(folded)) == (20, 0)
    x = pixels(2, 3, 64, 64).double()
    assert distance(folded(x), model(x)) < 1e-12 * float(model(x).detach().abs().max().clamp(min=1))


def test_fold_norms_refuses_a_model_without_a_graph() -> None:
    with pytest.raises(ModelError, match=r"Detector .*no graph.*a pruned model"):
        fxprune.fold_norms(build(Detector))


# Layers that know how to run without their norm -----------------------------------------------------------------------


def test_fold_norms_of_a_yolo_equals_its_own_fuse() -> None:
    ultralytics = pytest.importorskip("ultralytics")
    yolo = ultralytics.YOLO("yolov8n.yaml")
    varied(yolo.model)
    x = pixels(1, 3, 64, 64).double()
    whole = copy.deepcopy(yolo.model)
    folded: Any = fxprune.fold_norms(yolo)
    assert type(folded) is type(yolo)
    assert norms(folded) == 0 < norms(yolo)
    with torch.no_grad():
        expected, found = whole(x)[0], copy.deepcopy(folded.model)(x)[0]
    assert distance(found, expected) < EXACT * float(expected.detach().abs().max())
    itself = whole.fuse(verbose=False).state_dict()
    assert folded.model.state_dict().keys() == itself.keys()
    assert folded.model.is_fused()


def test_fold_norms_keeps_layers_with_another_fused_forward() -> None:
    conv = pytest.importorskip("ultralytics.nn.modules.conv")

    class Other(conv.Conv):  # type: ignore[name-defined,misc]
        def forward_fuse(self, x: Tensor) -> Tensor:
            return self.conv(x)

    kinds = {"plain": conv.Conv(4, 6), "depthwise": conv.DWConv(4, 4, 3), "two": conv.Conv2(4, 6), "other": Other(4, 6)}
    for name, layer in kinds.items():
        model = nn.Sequential(varied(layer), fx.symbolic_trace(nn.Sequential(nn.ReLU())))
        folded = fxprune.fold_norms(model)
        assert norms(folded) == (0 if name in ("plain", "depthwise") else 1)
        x = image(model)
        assert distance(folded(x), model(x)) < EXACT
