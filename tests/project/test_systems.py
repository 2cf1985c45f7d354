"""Six systems and more, pruned at 10 % by code that names none of them, keep their kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fxprune
from fxprune.adapters.registry import choose_adapter, unwrap
from tests.helpers.batches import batched, boxed, classified, keyed, masked
from tests.helpers.flops import flops_of

classification, detection = torchvision.models, torchvision.models.detection


@dataclass(frozen=True)
class System:
    """A model, one calibration batch, and how to make an image batch of another size for it."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    sizes: tuple[tuple[int, int], ...]
    slow: bool = True


def classifier(name: str, *sizes: tuple[int, int], slow: bool = True, **options: Any) -> System:
    sizes = sizes or ((64, 64), (96, 64), (64, 128))
    return System(lambda: getattr(classification, name)(num_classes=10, **options), classified, sizes, slow)


def detector(name: str, batch: Callable[[int, int], Any] = boxed, slow: bool = True, **options: Any) -> System:
    def build() -> nn.Module:
        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **options)

    return System(build, batch, ((96, 128), (128, 96), (96, 160)), slow)


def yolo(name: str, kind: str = "YOLO", slow: bool = True) -> System:
    def build() -> nn.Module:
        ultralytics = pytest.importorskip("ultralytics")
        return getattr(ultralytics, kind)(f"{name}.yaml")

    return System(build, batched, ((128, 160), (160, 128), (192, 192)), slow)


def with_a_head() -> nn.Module:
    """A vision transformer whose last layer is not torchvision's zeros, behind which no gradient would come."""
    model = classification.vit_b_32(num_classes=10, image_size=64)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


small: dict[str, Any] = {"min_size": 96, "max_size": 160}
SYSTEMS: dict[str, System] = {
    "resnet50": classifier("resnet50", slow=False),
    "mobilenet_v2": classifier("mobilenet_v2", slow=False),
    "shufflenet_v2_x1_0": classifier("shufflenet_v2_x1_0", slow=False),
    "fasterrcnn_resnet50_fpn": detector("fasterrcnn_resnet50_fpn", slow=False, **small),
    "retinanet_resnet50_fpn": detector("retinanet_resnet50_fpn", slow=False, **small),
    "yolov8n": yolo("yolov8n", slow=False),
    "retinanet_resnet50_fpn_v2": detector("retinanet_resnet50_fpn_v2", **small),
    "fcos_resnet50_fpn": detector("fcos_resnet50_fpn", **small),
    "maskrcnn_resnet50_fpn": detector("maskrcnn_resnet50_fpn", masked, **small),
    "keypointrcnn_resnet50_fpn": System(
        lambda: detection.keypointrcnn_resnet50_fpn(weights=None, weights_backbone=None, **small),
        keyed,
        ((96, 128), (128, 96), (96, 160)),
    ),
    "ssdlite320_mobilenet_v3_large": detector("ssdlite320_mobilenet_v3_large", slow=False),
    "ssd300_vgg16": detector("ssd300_vgg16"),
    "regnet_y_400mf": classifier("regnet_y_400mf"),
    "efficientnet_b0": classifier("efficientnet_b0", slow=False),
    "convnext_tiny": classifier("convnext_tiny"),
    "vit_b_32": System(with_a_head, classified, ((64, 64),)),
    "googlenet": classifier("googlenet", slow=False, init_weights=False, aux_logits=False),
    "mobilenet_v3_small": classifier("mobilenet_v3_small"),
    "yolov5n": yolo("yolov5n"),
    "yolov9t": yolo("yolov9t"),
    "yolov10n": yolo("yolov10n"),
    "yolo11n": yolo("yolo11n", slow=False),
    "yolo12n": yolo("yolo12n"),
    "yolo26n": yolo("yolo26n"),
    "rtdetr-l": yolo("rtdetr-l", "RTDETR"),
}


def structure(value: Any) -> Any:
    """Containers, and rank and dtype of every tensor in them."""
    leaves, tree = tree_flatten(value)
    return str(tree), [(leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]


def images_of(raw: Any) -> Any:
    return raw["img"] if isinstance(raw, Mapping) else raw[0]


@pytest.mark.filterwarnings("ignore:after healing:fxprune.FxpruneWarning")  # weights are random
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if system.slow else name for name, system in SYSTEMS.items()]
)
def test_pruned_system_keeps_its_kind_and_is_smaller(name: str) -> None:
    system = SYSTEMS[name]
    model = system.build()
    network = unwrap(model).eval()
    raw = system.batch(*system.sizes[0])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    pruned = fxprune.compile(model, [raw], budget=0.1, heal="none")
    report = fxprune.report(pruned)
    smaller = unwrap(pruned)

    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert type(pruned).__name__ == type(model).__name__
    assert isinstance(smaller, type(network) if not isinstance(smaller, torch.fx.GraphModule) else torch.fx.GraphModule)
    assert not smaller.training
    assert report.removed
    assert report.after.flops <= 0.9 * report.before.flops

    state = smaller.state_dict()
    assert set(state) < set(before)
    narrowed = [key for key in state if state[key].shape != before[key].shape]
    assert all(torch.equal(state[key], before[key]) for key in state if key not in narrowed)
    for key in narrowed:  # channels that are the same have their weights added up
        assert state[key].shape[1] < before[key].shape[1]
        torch.testing.assert_close(state[key].sum(1), before[key].sum(1), atol=1e-5, rtol=1e-5)
    assert report.after.params == sum(parameter.numel() for parameter in smaller.parameters())
    assert report.before.params > report.after.params

    healed = unwrap(fxprune.heal(pruned, model, [raw], "affine"))
    assert type(healed).__name__ == type(smaller).__name__
    assert isinstance(healed, torch.fx.GraphModule) == isinstance(smaller, torch.fx.GraphModule)
    assert {key: value.shape for key, value in healed.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }

    for size in system.sizes:
        images = images_of(system.batch(*size))
        with torch.no_grad():
            assert structure(smaller(images)) == structure(network(images)), size
    images = images_of(raw)
    if "rcnn" not in name:  # what their second stage costs depends on the proposals
        ratio = flops_of(smaller, images) / flops_of(network, images)
        assert ratio == pytest.approx(report.after.flops / report.before.flops, rel=2e-2)
    check_training(smaller, raw)
    twin = copy.deepcopy(pruned)
    assert fxprune.report(twin).to_dict() == report.to_dict()
    half = unwrap(twin).half()
    assert all(value.dtype != torch.float32 for value in half.state_dict().values() if value.is_floating_point())


def check_training(network: nn.Module, raw: Any) -> None:
    """One backward pass and one optimizer step in train mode change the weights."""
    trained = copy.deepcopy(network).train()
    adapter = choose_adapter(trained, raw, None)
    adapter.prepare(trained)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)
    loss = adapter.loss(trained, adapter.normalize(trained, raw)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    assert sum(float(gradient.abs().sum()) > 0 for gradient in gradients) > 5
    before = [parameter.detach().clone() for parameter in trained.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_package_names_no_model() -> None:
    from pathlib import Path

    root = Path(fxprune.__file__).parent
    names = ("resnet", "retinanet", "faster", "yolov", "shufflenet", "c2f", "bottleneck")
    demo_files = {"bundled.py", "run.py"}
    for path in root.rglob("*.py"):
        code = "\n".join(
            line for line in path.read_text(encoding="utf-8").lower().splitlines() if not line.lstrip().startswith("#")
        )
        code = strip_docstrings(code)
        if path.name not in demo_files:
            assert not [name for name in names if name in code], path


def strip_docstrings(code: str) -> str:
    """Code without its strings: names of models may stand in examples."""
    import ast

    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


@pytest.mark.filterwarnings("ignore:.*ooks untrained:fxprune.FxpruneWarning")
@pytest.mark.parametrize("name", ["mobilenet_v2", "ssdlite320_mobilenet_v3_large", "yolov8n"])
def test_compile_works_with_images_alone(name: str) -> None:
    system = SYSTEMS[name]
    model = system.build()
    raw = system.batch(*system.sizes[0])
    images = {"img": raw["img"]} if isinstance(raw, dict) else raw[0]
    pruned = fxprune.compile(model, [images], budget=0.1)
    report = fxprune.report(pruned)
    assert report.settings["targets"] == "the model's own confident outputs"
    assert report.removed
