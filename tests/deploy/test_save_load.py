"""A saved model is loaded bit for bit: every kind of model, dtype and mode, also in a fresh process."""

from __future__ import annotations

import copy
import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, retinanet_resnet50_fpn

import fxprune
from fxprune.adapters.registry import unwrap
from fxprune.demo.bundled import build_detector, load_dataset, load_detector
from tests.helpers.batches import batched, boxed
from tests.helpers.hostile import assert_unchanged
from tests.helpers.models import Tiny, labelled, pixels, tiny
from tests.helpers.paths import ROOT

X = pixels(2, 3, 16, 16, seed=9)


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        found = [leaf for leaf in tree_leaves(unwrap(model)(x)) if isinstance(leaf, Tensor)]
    assert any(leaf.numel() for leaf in found)
    return found


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in unwrap(model).named_modules()}


def round_trip(pruned: nn.Module, fresh: nn.Module, folder: Path) -> nn.Module:
    """Save, load into a model of other weights, and hold the result to the saved one's state, modes and report."""
    with assert_unchanged(pruned):
        fxprune.save(pruned, folder)
    with assert_unchanged(fresh):
        again = fxprune.load(fresh, folder)
    kept, found, given = (unwrap(model).state_dict() for model in (pruned, again, fresh))
    assert list(found) == list(kept)
    assert equal(list(found.values()), list(kept.values()))
    assert any(not torch.equal(value.float(), given[key].float()) for key, value in found.items())
    assert [value.stride() for value in found.values()] == [value.stride() for value in kept.values()]
    assert modes(again) == modes(pruned)
    assert fxprune.report(again) == fxprune.report(pruned)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}
    return again


@pytest.fixture
def pruned() -> nn.Module:
    return fxprune.compile(tiny(), labelled(), criterion="l1")


# Systems -------------------------------------------------------------------------------------------------------------


def yolo() -> Any:
    model = pytest.importorskip("ultralytics").YOLO("yolov8n.yaml")
    model.model.eval()
    return model


def region_proposals() -> nn.Module:
    options = {"weights": None, "weights_backbone": None, "num_classes": 5, "box_score_thresh": 0.0, "min_size": 96}
    return fasterrcnn_mobilenet_v3_large_320_fpn(**options).eval()


def retina() -> nn.Module:
    options = {"weights": None, "weights_backbone": None, "num_classes": 5, "score_thresh": 0.0, "min_size": 96}
    return retinanet_resnet50_fpn(**options).eval()


SYSTEMS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any]] = {
    "tiny": (tiny, lambda: tiny(1), labelled()[0]),
    "ssdlite": (
        load_detector,
        build_detector,
        ([load_dataset("calibration")[0][0]], [load_dataset("calibration")[0][1]]),
    ),
    "yolov8n": (yolo, yolo, batched(96, 96)),
    "faster_rcnn": (region_proposals, region_proposals, boxed(96, 96)),
    "retinanet": (retina, retina, boxed(96, 96)),
}
SLOW = {"faster_rcnn", "retinanet"}


@functools.cache
def pruned_system(name: str) -> Any:
    build, _, batch = SYSTEMS[name]
    return fxprune.compile(build(), [batch], budget=0.05, criterion="l1")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SYSTEMS])
def test_saved_system_is_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    pruned, (_, rebuild, batch) = pruned_system(name), SYSTEMS[name]
    again = round_trip(pruned, rebuild(), tmp_path / "saved")
    assert again.__class__.__qualname__ == pruned.__class__.__qualname__
    x = batch["img"] if isinstance(batch, dict) else batch[0]
    assert equal(outputs(again, x), outputs(pruned, x))


def test_yolo_is_saved_with_or_without_wrapper_but_not_fused(tmp_path: Path) -> None:
    pruned = pruned_system("yolov8n")
    file = io.BytesIO()
    torch.save(pruned.model, file)
    file.seek(0)
    fxprune.save(torch.load(file, weights_only=False), tmp_path / "network")
    again = fxprune.load(yolo(), tmp_path / "network")
    assert type(again).__name__ == "YOLO"
    assert equal(outputs(again, pixels(1, 3, 96, 96)), outputs(pruned, pixels(1, 3, 96, 96)))
    network = copy.deepcopy(pruned.model)
    network.fuse(verbose=False)
    with pytest.raises(fxprune.StorageError, match=r"'model\.0\.bn\.weight' .*gone.*fuse"):
        fxprune.save(network, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


# What a model may have been through ----------------------------------------------------------------------------------


def test_load_in_a_fresh_process_gives_the_same_bits(pruned: nn.Module, tmp_path: Path) -> None:
    fxprune.save(pruned, tmp_path / "saved")
    save_file({"x": X}, tmp_path / "x")
    code = (
        "import sys, torch, fxprune; from pathlib import Path; from tests.helpers.models import tiny;"
        "from safetensors.torch import load_file, save_file; folder = Path(sys.argv[1]);"
        "model = fxprune.load(tiny(7), folder / 'saved');"
        "save_file({'y': model(load_file(folder / 'x')['x']).detach()}, folder / 'y')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert torch.equal(load_file(tmp_path / "y")["y"], pruned(X))


def train_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.1)
    model(X).square().sum().backward()
    optimizer.step()


def test_model_trained_after_pruning_is_loaded_as_trained(pruned: nn.Module, tmp_path: Path) -> None:
    before = outputs(pruned, X)
    pruned.train()
    next(module for module in pruned.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    train_step(pruned)
    again = round_trip(pruned, tiny(1).eval(), tmp_path / "saved")
    assert len(set(modes(again).values())) == 2
    assert not equal(outputs(again.eval(), X), before)
    assert equal(outputs(again, X), outputs(pruned.eval(), X))


class Shifted(Tiny):
    """Reads a buffer that is in no `state_dict`."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.full((1,), 0.1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_loaded_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    pruned = fxprune.compile(Shifted().eval(), labelled(), criterion="l1").to(dtype)
    again = round_trip(pruned, Shifted(), tmp_path / "saved")
    assert {value.dtype for value in again.buffers() if value.is_floating_point()} == {dtype}
    assert equal(outputs(again, X.to(dtype)), outputs(pruned, X.to(dtype)))


def test_norms_in_another_dtype_are_loaded_bit_for_bit(pruned: nn.Module, tmp_path: Path) -> None:
    pruned.bfloat16()
    for module in pruned.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    again = round_trip(pruned, tiny(1), tmp_path / "saved")
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last])
def test_load_restores_the_saved_memory_format(pruned: nn.Module, saved: Any, given: Any, tmp_path: Path) -> None:
    fresh = tiny(1).to(memory_format=given)
    again = round_trip(pruned.to(memory_format=saved), fresh, tmp_path / "saved")
    assert equal(outputs(again, X), outputs(pruned, X))


def test_model_pruned_twice_is_loaded_bit_for_bit(pruned: nn.Module, tmp_path: Path) -> None:
    train_step(pruned.train())
    twice = fxprune.compile(copy.deepcopy(pruned).eval(), labelled(), criterion="l1")
    again = round_trip(twice, tiny(1), tmp_path / "saved")
    assert sum(1 for _ in again.parameters()) < sum(1 for _ in pruned.parameters())
    assert equal(outputs(again, X), outputs(twice, X))
    assert {path.name for path in (tmp_path / "saved").glob("plan*")} == {"plan-1.json", "plan-2.json"}


class Tied(Tiny):
    """Two heads with one weight, which is one parameter."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 5)
        if tied:
            self.aux.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x)).mean((2, 3))
        return self.fc(x) - 2 * self.aux(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_stay_tied(dtype: torch.dtype, tmp_path: Path) -> None:
    pruned: Any = fxprune.compile(Tied().eval(), labelled(), criterion="l1").to(dtype)
    assert pruned.aux.weight is pruned.fc.weight
    again: Any = round_trip(pruned, Tied(), tmp_path / "saved")
    assert again.aux.weight is again.fc.weight
    stored = load_file(tmp_path / "saved" / "weights.safetensors")
    assert set(pruned.state_dict()) - set(stored) == {"aux.weight"}
    apart: Any = fxprune.load(Tied(tied=False), tmp_path / "saved")
    assert apart.aux.weight.data_ptr() != apart.fc.weight.data_ptr()
    for model in (again, apart):
        assert equal(outputs(model, X.to(dtype)), outputs(pruned, X.to(dtype)))


def test_weights_untied_after_pruning_are_refused(tmp_path: Path) -> None:
    pruned: Any = fxprune.compile(Tied().eval(), labelled(), criterion="l1")
    pruned.aux.weight = nn.Parameter(2 * pruned.fc.weight.detach())
    fxprune.save(pruned, tmp_path / "saved")
    with pytest.raises(fxprune.StorageError, match=r"fc\.weight .*value of its own"):
        fxprune.load(Tied(), tmp_path / "saved")


# What comes from the given model, and what the files are -------------------------------------------------------------


def test_load_keeps_requires_grad_of_the_given_model(pruned: nn.Module, tmp_path: Path) -> None:
    fxprune.save(pruned.to(memory_format=torch.channels_last).requires_grad_(False), tmp_path / "saved")
    fresh: Any = tiny(1)
    fresh.stem.requires_grad_(False)
    with torch.inference_mode():
        again = fxprune.load(fresh, tmp_path / "saved")
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {"stem.weight", "stem.bias"}
    train_step(again)
    assert not equal(outputs(again, X), outputs(pruned, X))


@pytest.mark.gpu
@pytest.mark.parametrize(("saved", "given"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_load_keeps_the_device_of_the_given_model(pruned: nn.Module, saved: str, given: str, tmp_path: Path) -> None:
    fxprune.save(pruned.to(saved), tmp_path / "saved")
    again = fxprune.load(tiny(1).to(given), tmp_path / "saved")
    assert {value.device.type for value in again.state_dict().values()} == {given}
    assert equal(list(again.cpu().state_dict().values()), list(pruned.cpu().state_dict().values()))


def test_saved_files_are_json_or_safetensors(pruned: nn.Module, tmp_path: Path) -> None:
    fxprune.save(pruned, tmp_path / "runs" / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "saved").iterdir()}
    assert set(files) == {"plan.json", "weights.safetensors", "manifest.json"}
    weights = files.pop("weights.safetensors")
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    spans = sorted(tuple(row["data_offsets"]) for key, row in header.items() if key != "__metadata__")
    assert [end for _, end in spans] == [*(start for start, _ in spans[1:]), len(weights) - 8 - length]
    assert all(isinstance(json.loads(content), dict) for content in files.values())
    assert fxprune.Plan.load(tmp_path / "runs" / "saved" / "plan.json").removed


def test_saved_weights_load_with_plain_safetensors(pruned: nn.Module, tmp_path: Path) -> None:
    fxprune.save(pruned, tmp_path / "saved")
    twin = fxprune.apply(tiny(1), fxprune.Plan.load(tmp_path / "saved" / "plan.json"))
    twin.load_state_dict(load_file(tmp_path / "saved" / "weights.safetensors"))
    assert equal(outputs(twin, X), outputs(pruned, X))
