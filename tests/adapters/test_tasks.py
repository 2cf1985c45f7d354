"""Every task of ultralytics can be pruned with images alone and with labels; its own outputs become labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.adapters.protocol import Batch
from fxprune.adapters.ultralytics import adapter
from fxprune.adapters.ultralytics.tasks import TASKS, label, task_of
from tests.helpers.yolo_data import write_data

ultralytics = pytest.importorskip("ultralytics")
BOXED = ["yolov8n-seg.yaml", "yolov8n-pose.yaml", "yolov8n-obb.yaml", "yolo26n-seg.yaml", "yolo26n-obb.yaml"]
OTHERS = ["yolov8n-cls.yaml", "yolo26n-sem.yaml"]


def build(yaml: str) -> Any:
    """A network with random weights whose norms vary, so that its outputs differ from place to place."""
    torch.manual_seed(0)
    network = ultralytics.YOLO(yaml).model
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    adapter.prepare(network)
    return network.eval()


def images() -> Tensor:
    return torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))


def labels_of(yaml: str) -> dict[str, Any]:
    boxes = {
        "cls": torch.zeros(2, 1),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]] * 2),
        "batch_idx": torch.arange(2.0),
    }
    return {
        "yolov8n-seg.yaml": {**boxes, "masks": torch.ones(2, 24, 16)},
        "yolov8n-pose.yaml": {**boxes, "keypoints": torch.rand(2, 17, 3)},
        "yolov8n-obb.yaml": {**boxes, "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.3, 0.2]] * 2)},
        "yolov8n-cls.yaml": {"cls": torch.tensor([3, 4])},
    }[yaml]


@pytest.mark.parametrize("yaml", [*BOXED, *OTHERS])
def test_own_outputs_are_labels_of_the_task(yaml: str) -> None:
    network = build(yaml)
    batch = label(network, Batch(images(), None, 2))
    task = task_of(network)
    assert {"img", *task.keys} == set(batch.targets)
    parts = adapter.loss(network, batch)
    assert bool(torch.isfinite(parts).all())
    torch.autograd.backward(parts.sum())
    weights = [value for value in network.parameters() if value.grad is not None and bool(value.grad.abs().sum() > 0)]
    assert len(weights) > 20
    if task.columns:
        count = len(batch.targets["cls"])
        assert batch.targets["bboxes"].shape == (count, task.columns)
        assert len(batch.targets["batch_idx"]) == count > 0


@pytest.mark.parametrize("yaml", BOXED[:3])
def test_own_labels_fit_better_than_moved_ones(yaml: str) -> None:
    network = build(yaml)
    batch = label(network, Batch(images(), None, 2))
    moved = {**batch.targets, "bboxes": batch.targets["bboxes"].clone()}
    moved["bboxes"][:, 0] = (moved["bboxes"][:, 0] + 0.4) % 1.0
    with torch.no_grad():
        own = adapter.loss(network, batch)[0]
        assert own < adapter.loss(network, Batch(batch.images, moved, 2))[0]


def test_masks_are_maps_of_numbers_with_small_objects_on_top() -> None:
    network = build("yolov8n-seg.yaml")
    masks = label(network, Batch(images(), None, 2)).targets
    for image, painted in enumerate(masks["masks"]):
        count = int((masks["batch_idx"] == image).sum())
        areas = [int((painted == number).sum()) for number in range(1, count + 1)]
        assert int(painted.max()) <= count
        assert areas[-1] > 0 or sum(areas) == 0
    network.args.overlap_mask = False
    single = label(network, Batch(images(), None, 2)).targets
    assert len(single["masks"]) == len(single["cls"])
    last = single["masks"][single["batch_idx"] == 0][-1]
    assert torch.equal(last > 0, masks["masks"][0] == int((masks["batch_idx"] == 0).sum()))


@pytest.mark.parametrize(
    ("yaml", "heal"),
    [
        ("yolov8n-seg.yaml", "affine"),
        ("yolov8n-pose.yaml", "none"),
        ("yolov8n-obb.yaml", "none"),
        ("yolov8n-cls.yaml", "affine"),
    ],
)
def test_labelled_batches_are_pruned_and_keep_the_outputs_shape(yaml: str, heal: str) -> None:
    model = ultralytics.YOLO(yaml)
    pruned: Any = fxprune.compile(model, [{"img": images(), **labels_of(yaml)}] * 2, budget=0.05, heal=heal)
    found = [torch.utils._pytree.tree_leaves(net.model.eval()(images())) for net in (model, pruned)]
    assert [value.shape for value in found[0]] == [value.shape for value in found[1]]
    assert fxprune.report(pruned).removed


@pytest.mark.parametrize("yaml", ["yolov8n-seg.yaml", "yolov8n-pose.yaml"])
def test_missing_labels_are_named(yaml: str) -> None:
    network = build(yaml)
    known = labels_of(yaml)
    key = task_of(network).keys[-1]
    with pytest.raises(fxprune.BatchError, match=rf"the batch lacks \['{key}'\]"):
        adapter.normalize(network, {"img": images(), **{name: value for name, value in known.items() if name != key}})


def test_classes_come_as_pairs_or_by_name_and_are_checked() -> None:
    network, classes = build("yolov8n-cls.yaml"), torch.tensor([[3], [4]])
    for raw in ((images(), classes), {"img": images(), "cls": classes}):
        assert adapter.normalize(network, raw).targets["cls"].tolist() == [3, 4]
    for wrong in (torch.tensor([3, 1000]), torch.tensor([1])):
        with pytest.raises(fxprune.BatchError, match=r"cls runs from 3 to 1000|2 images but 1 cls"):
            adapter.normalize(network, (images(), wrong))


def test_depth_without_labels_says_what_to_give() -> None:
    network = build("yolo26n-depth.yaml")
    with pytest.raises(fxprune.ModelError, match="give labels as"):
        label(network, Batch(images(), None, 2))
    parts = adapter.loss(network, adapter.normalize(network, {"img": images(), "depth": torch.rand(2, 96, 64) + 1}))
    assert bool((parts > 0).all())


def test_an_unknown_task_is_named() -> None:
    network = build("yolov8n-cls.yaml")
    network.task = "juggle"
    with pytest.raises(fxprune.ModelError, match="task 'juggle'; known are detect"):
        task_of(network)
    assert len(TASKS) == 7


TASK_LABELS = {
    "yolov8n-seg.yaml": "0 .2 .2 .7 .2 .7 .7 .2 .7\n",
    "yolov8n-pose.yaml": "0 .5 .5 .4 .4 " + ".5 .5 2 " * 17 + "\n",
    "yolov8n-obb.yaml": "0 .2 .2 .7 .2 .7 .7 .2 .7\n",
}


@pytest.mark.parametrize("yaml", TASK_LABELS)
def test_batches_of_a_data_set_are_images_alone_where_boxes_are_not_enough(yaml: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", ["cat"], TASK_LABELS[yaml], kpt_shape=[17, 3])
    network = build(yaml)
    batches = fxprune.batches(network, fxprune.YoloDataset(data, "train"), image_size=64, labels={0: 0})
    (batch,) = (adapter.normalize(network, raw) for raw in batches)
    assert batch.targets is None
    assert batch.images.shape == (4, 3, 64, 64)


def test_accuracy_and_agreement_of_a_classifier_are_measured() -> None:
    network = build("yolov8n-cls.yaml")
    pruned = fxprune.compile(network, [{"img": images(), **labels_of("yolov8n-cls.yaml")}], budget=0.05)
    measured = fxprune.report(pruned).plans[-1].settings.measured
    assert measured["quality"]["name"] == "accuracy"
    assert 0 <= measured["agreement"]["share"] <= 1
