"""The six detectors that the evidence is measured on: torchvision's and ultralytics' own classes, digits as classes.

ResNet-50, MobileNetV2 and ShuffleNetV2 are classifiers; here each is the backbone of one and the same detector, an SSD
with SSDLite heads on a feature pyramid (`ssdlite_on`).
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

CLASSES = 11
"""Background and ten digits, as torchvision counts."""
ANCHOR_SIDES = (16, 28, 44, 70, 100)
"""Side of the square default boxes of each pyramid level in pixels, and one more."""


@dataclass(frozen=True)
class Recipe:
    """How one detector is made and trained.

    Attributes
    ----------
    build : callable
        ``(side of the images in pixels) -> Module`` with random weights.
    size : int
        Side of the images in pixels.
    epochs, learning_rate
        Of one run on 8,000 images.
    imagenet : callable, optional
        Gives ImageNet weights for ``backbone.body``; None where the run starts from random weights or from `start`.
    start : str, optional
        The detector whose trained tensors this one starts from, wherever name and shape agree.
    """

    build: Callable[[int], nn.Module]
    size: int = 160
    epochs: int = 3
    learning_rate: float = 2e-3
    imagenet: Callable[[], nn.Module] | None = None
    start: str | None = None


def ssdlite_on(body: nn.Module, layers: dict[str, str], channels: list[int], width: int, size: int) -> SSD:
    """An SSD with SSDLite heads on a feature pyramid over `layers` of a classifier's trunk.

    Parameters
    ----------
    body : Module
        Its children, called in order, are the trunk.
    layers : dict of str to str
        Children to take maps of strides 8, 16, 32 from; one of stride 64 is pooled.
    channels : list of int
        Of those maps.
    width : int
        Channels of the pyramid.
    size : int
        Side of the images in pixels.
    """
    backbone = BackboneWithFPN(body, layers, channels, width, norm_layer=nn.BatchNorm2d)
    anchors = DefaultBoxGenerator([[2, 3]] * (len(layers) + 1), scales=[side / size for side in ANCHOR_SIDES])
    head = SSDLiteHead(
        [width] * (len(layers) + 1), anchors.num_anchors_per_location(), CLASSES, norm_layer=nn.BatchNorm2d
    )
    return SSD(backbone, anchors, (size, size), CLASSES, head=head, detections_per_img=100)


def resnet50(size: int) -> SSD:
    """ResNet-50, all four stages."""
    body = models.resnet50(weights=None)
    return ssdlite_on(body, {"layer2": "0", "layer3": "1", "layer4": "2"}, [512, 1024, 2048], 128, size)


def mobilenet_v2(size: int) -> SSD:
    """MobileNetV2 up to its last inverted residual."""
    body = models.mobilenet_v2(weights=None).features
    return ssdlite_on(body, {"6": "0", "13": "1", "17": "2"}, [32, 96, 320], 64, size)


def shufflenet_v2(size: int) -> SSD:
    """ShuffleNetV2 x1.0, all three stages."""
    body = models.shufflenet_v2_x1_0(weights=None)
    return ssdlite_on(body, {"stage2": "0", "stage3": "1", "stage4": "2"}, [116, 232, 464], 64, size)


def faster_rcnn(size: int) -> FasterRCNN:
    """Faster R-CNN with ResNet-50-FPN; anchors and proposals for small images."""
    anchors = AnchorGenerator(tuple((10.0 * 2**level,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
    return fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=size, max_size=size,
        rpn_anchor_generator=anchors, rpn_pre_nms_top_n_train=400, rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=50, box_batch_size_per_image=32,
    )  # fmt: skip


def retinanet(size: int) -> RetinaNet:
    """RetinaNet v2 (GroupNorm in its heads) with ResNet-50-FPN; anchors for small images."""
    model: RetinaNet = retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=size, max_size=size, detections_per_img=100
    )
    sides = [12.0 * 2**level for level in range(5)]
    model.anchor_generator = AnchorGenerator(
        tuple((side, side * 2 ** (1 / 3), side * 2 ** (2 / 3)) for side in sides), ((0.5, 1.0, 2.0),) * 5
    )
    return model


def yolov8n(size: int) -> nn.Module:
    """YOLOv8n from its YAML; any image size."""
    from ultralytics.nn.tasks import DetectionModel

    model: nn.Module = DetectionModel("yolov8n.yaml", nc=CLASSES - 1, verbose=False)
    return model


def imagenet_mobilenet_v2() -> nn.Module:
    """torchvision's ImageNet trunk; `benchmarks.training.train_demo` says where to get the file offline."""
    features: nn.Module = models.mobilenet_v2(weights="IMAGENET1K_V1").features
    return features


DETECTORS: dict[str, Recipe] = {
    "resnet50_ssdlite": Recipe(resnet50, size=96, epochs=3, learning_rate=1e-3),
    "mobilenet_v2_ssdlite": Recipe(mobilenet_v2, epochs=3, imagenet=imagenet_mobilenet_v2),
    "shufflenet_v2_ssdlite": Recipe(shufflenet_v2, epochs=12),
    "fasterrcnn_resnet50_fpn": Recipe(faster_rcnn, size=96, epochs=1, learning_rate=5e-4, start="resnet50_ssdlite"),
    "retinanet_resnet50_fpn_v2": Recipe(retinanet, size=96, epochs=1, learning_rate=5e-4, start="resnet50_ssdlite"),
    "yolov8n": Recipe(yolov8n, epochs=3, learning_rate=2e-3),
}
"""The six by name. On CPU the ResNet-50 ones see smaller images, with digits as large in pixels."""
