"""Models with random weights, each with one labelled batch: six systems that tests and benchmarks share, and more.

Weights and images are drawn from a seed. What follows from the structure (regions, FLOPs, time) is as in a trained
model. Which region counts as least important is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection


@dataclass(frozen=True)
class Sizes:
    """Side of the square images in pixels and images a batch, for classifiers and for detectors; and the seed."""

    classifier_px: int = 224
    classifier_images: int = 8
    detector_px: int = 320
    detector_images: int = 2
    seed: int = 0


@dataclass(frozen=True)
class System:
    """A model and its batch.

    Attributes
    ----------
    name : str
        As its library calls it.
    family : str
        ``classifier``, ``torchvision`` or ``ultralytics``: decides the form of the batch.
    make : callable
        ``(side in pixels) -> Module`` with random weights.
    """

    name: str
    family: str
    make: Callable[[int], nn.Module]

    def build(self, sizes: Sizes, images: int | None = None) -> tuple[nn.Module, Any]:
        """Make the model and one batch.

        Parameters
        ----------
        sizes : Sizes
            Seed and sizes.
        images : int, optional
            Images in the batch, if not what `sizes` says.

        Returns
        -------
        model : Module
            In eval mode.
        batch
            In the form the model's family takes, with labels.
        """
        classifies = self.family == "classifier"
        px = sizes.classifier_px if classifies else sizes.detector_px
        count = images or (sizes.classifier_images if classifies else sizes.detector_images)
        torch.manual_seed(sizes.seed)
        model = self.make(px).eval()
        return model, BATCHES[self.family](torch.rand(count, 3, px, px))


def _boxes(images: Tensor) -> Tensor:
    """Two boxes (2, 4) an image, xyxy in pixels: a large one on the left and a small one on the right."""
    side = images.shape[-1]
    return torch.tensor([[0.05, 0.10, 0.55, 0.80], [0.60, 0.55, 0.90, 0.85]]) * side


def classifier_batch(images: Tensor) -> Any:
    """Images and one class index each."""
    return images, torch.arange(len(images))


def torchvision_batch(images: Tensor) -> Any:
    """A list of images, and a list of targets with two boxes each, their masks and keypoints."""
    boxes, side = _boxes(images), images.shape[-1]
    masks = torch.zeros(2, side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    points = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) * torch.linspace(0.1, 0.9, 17)[:, None, None]
    keypoints = torch.cat([points.transpose(0, 1), torch.ones(2, 17, 1)], 2)
    target = {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": keypoints}
    return list(images), [dict(target) for _ in images]


def ultralytics_batch(images: Tensor) -> Any:
    """A dict of images and two boxes each, xywh as fractions of the side."""
    boxes, count = _boxes(images) / images.shape[-1], len(images)
    xywh = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    return {
        "img": images,
        "cls": torch.tensor([[1.0], [2.0]]).repeat(count, 1),
        "bboxes": xywh.repeat(count, 1),
        "batch_idx": torch.arange(count).repeat_interleave(2).float(),
    }


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "classifier": classifier_batch,
    "torchvision": torchvision_batch,
    "ultralytics": ultralytics_batch,
}


def _classifier(name: str) -> System:
    return System(name, "classifier", lambda px: models.get_model(name, weights=None))


def _detector(name: str, resizes: bool = True) -> System:
    """A torchvision detector that leaves images at their size; SSDs resize to the size they are made for."""

    def make(px: int) -> nn.Module:
        size = {"min_size": px} if resizes else {}
        model: nn.Module = detection.__dict__[name](weights=None, weights_backbone=None, **size)
        return model

    return System(name, "torchvision", make)


def _ultralytics(yaml: str, label: str | None = None) -> System:
    def make(px: int) -> nn.Module:
        from ultralytics import RTDETR, YOLO

        model: nn.Module = (RTDETR if yaml.startswith("rtdetr") else YOLO)(yaml).model
        return model

    return System(label or yaml.removesuffix(".yaml"), "ultralytics", make)


SIX: tuple[System, ...] = (
    _classifier("resnet50"),
    _classifier("mobilenet_v2"),
    _classifier("shufflenet_v2_x1_0"),
    _detector("fasterrcnn_resnet50_fpn"),
    _detector("retinanet_resnet50_fpn"),
    _ultralytics("yolov8n.yaml"),
)
MORE: tuple[System, ...] = (
    *map(_classifier, ("densenet121", "efficientnet_b0", "mobilenet_v3_large", "regnet_y_400mf", "convnext_tiny")),
    *map(_classifier, ("vgg16_bn", "squeezenet1_1", "swin_t", "vit_b_16")),
    *map(_detector, ("fcos_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn_v2")),
    *map(_detector, ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn")),
    *(_detector(name, resizes=False) for name in ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")),
    _ultralytics("yolov5n.yaml", "yolov5nu"),
    *map(_ultralytics, ("yolov9t.yaml", "yolov10n.yaml", "yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml")),
    _ultralytics("rtdetr-l.yaml"),
)
