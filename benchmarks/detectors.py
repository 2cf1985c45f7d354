"""The six detectors that benchmarks train and measure: classes of torchvision and ultralytics, which find digits.

ResNet-50, MobileNetV2 and ShuffleNetV2 are classifiers. Each is the backbone of the same detector here: an SSD with
SSDLite heads on a feature pyramid (`build_ssdlite`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, RetinaNet, fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead

CLASS_COUNT = 11
"""Ten digits, and the background, which torchvision counts as a class."""
ANCHOR_SIDES_PX = (16, 28, 44, 70, 100)
"""Sides of the square default boxes, one for each pyramid level; the SSD's box generator takes one more."""


@dataclass(frozen=True)
class Recipe:
    """How one detector is made and trained.

    Attributes
    ----------
    build : callable
        ``(side of the images in pixels) -> Module`` with random weights.
    size : int
        Side of the images in pixels.
    epochs : int
        Of one run on 8,000 images.
    learning_rate : float
        Of the same run.
    imagenet : callable, optional
        Loads a network with ImageNet weights for ``backbone.body``; None if training starts elsewhere.
    start : str, optional
        The detector that training starts from: its tensors are copied wherever name and shape agree.
    """

    build: Callable[[int], nn.Module]
    size: int = 160
    epochs: int = 3
    learning_rate: float = 2e-3
    imagenet: Callable[[], nn.Module] | None = None
    start: str | None = None


def build_ssdlite(body: nn.Module, layers: dict[str, str], channels: list[int], width: int, size: int) -> SSD:
    """Build an SSD with SSDLite heads on a feature pyramid over layers of a classifier.

    Parameters
    ----------
    body : Module
        The classifier's feature layers, as children that are called in order.
    layers : dict of str to str
        Names of the children that give maps of strides 8, 16 and 32. A map of stride 64 is pooled from the last.
    channels : list of int
        Of those maps.
    width : int
        Channels of the pyramid.
    size : int
        Side of the images in pixels.
    """
    backbone = BackboneWithFPN(body, layers, channels, width, norm_layer=nn.BatchNorm2d)
    anchors = DefaultBoxGenerator([[2, 3]] * (len(layers) + 1), scales=[side / size for side in ANCHOR_SIDES_PX])
    head = SSDLiteHead(
        [width] * (len(layers) + 1), anchors.num_anchors_per_location(), CLASS_COUNT, norm_layer=nn.BatchNorm2d
    )
    return SSD(backbone, anchors, (size, size), CLASS_COUNT, head=head, detections_per_img=100)


def build_resnet50(size: int) -> SSD:
    """Build the SSD on ResNet-50, all four stages."""
    body = models.resnet50(weights=None)
    return build_ssdlite(body, {"layer2": "0", "layer3": "1", "layer4": "2"}, [512, 1024, 2048], 128, size)


def build_mobilenet_v2(size: int) -> SSD:
    """Build the SSD on MobileNetV2 up to its last inverted residual."""
    body = models.mobilenet_v2(weights=None).features
    return build_ssdlite(body, {"6": "0", "13": "1", "17": "2"}, [32, 96, 320], 64, size)


def build_shufflenet_v2(size: int) -> SSD:
    """Build the SSD on ShuffleNetV2 x1.0, all three stages."""
    body = models.shufflenet_v2_x1_0(weights=None)
    return build_ssdlite(body, {"stage2": "0", "stage3": "1", "stage4": "2"}, [116, 232, 464], 64, size)


def build_faster_rcnn(size: int) -> FasterRCNN:
    """Build Faster R-CNN with ResNet-50-FPN, and with anchors and proposals for small images."""
    anchors = AnchorGenerator(tuple((10.0 * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
    return fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASS_COUNT, min_size=size, max_size=size,
        rpn_anchor_generator=anchors, rpn_pre_nms_top_n_train=400, rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=50, box_batch_size_per_image=32,
    )  # fmt: skip


def build_retinanet(size: int) -> RetinaNet:
    """Build RetinaNet v2 (GroupNorm in its heads) with ResNet-50-FPN and anchors for small images."""
    model: RetinaNet = retinanet_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=CLASS_COUNT,
        min_size=size,
        max_size=size,
        detections_per_img=100,
    )
    sides = [12.0 * 2**level for level in range(5)]
    model.anchor_generator = AnchorGenerator(
        tuple((side, side * 2 ** (1 / 3), side * 2 ** (2 / 3)) for side in sides), ((0.5, 1.0, 2.0),) * 5
    )
    return model


def build_yolov8n(size: int) -> nn.Module:
    """Build YOLOv8n from its YAML; `size` is not used."""
    from ultralytics.nn.tasks import DetectionModel

    model: nn.Module = DetectionModel("yolov8n.yaml", nc=CLASS_COUNT - 1, verbose=False)
    return model


def load_imagenet_mobilenet_v2() -> nn.Module:
    """Load MobileNetV2's feature layers with torchvision's ImageNet weights.

    `benchmarks.training.train_demo` says where to get the file offline.
    """
    features: nn.Module = models.mobilenet_v2(weights="IMAGENET1K_V1").features
    return features


DETECTORS: dict[str, Recipe] = {
    "resnet50_ssdlite": Recipe(build_resnet50, size=96, epochs=3, learning_rate=1e-3),
    "mobilenet_v2_ssdlite": Recipe(build_mobilenet_v2, epochs=3, imagenet=load_imagenet_mobilenet_v2),
    "shufflenet_v2_ssdlite": Recipe(build_shufflenet_v2, epochs=12),
    "fasterrcnn_resnet50_fpn": Recipe(
        build_faster_rcnn, size=96, epochs=1, learning_rate=5e-4, start="resnet50_ssdlite"
    ),
    "retinanet_resnet50_fpn_v2": Recipe(
        build_retinanet, size=96, epochs=1, learning_rate=5e-4, start="resnet50_ssdlite"
    ),
    "yolov8n": Recipe(build_yolov8n, epochs=3, learning_rate=2e-3),
}
"""The six by name. Those with ResNet-50 take smaller images, to keep runs on CPUs short; digits are as large."""
