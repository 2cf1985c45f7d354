"""Loads a small trained detector and images for its evaluation, which are part of the package.

The detector finds handwritten digits on photographs ("composed digits"). `fxprune/demo/data/README.md` lists the
sources of the images, and `benchmarks/training/train_demo.py` made the files. No network connection is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v2
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation

from fxprune.datasets.coco import CocoDataset
from fxprune.errors import FxpruneError

Split = Literal["val", "calibration"]

IMAGE_SIZE = 160
CLASS_NAMES = ("background", *"0123456789")
WEIGHTS_FILE = "detector.safetensors"

# Index of the MobileNetV2 block of each feature map, and its channels. The strides are 8, 16 and 32.
TAP_CHANNELS = {6: 32, 13: 96, 17: 320}
EXTRA_CHANNELS = 128  # channels of an additional map of stride 64
PYRAMID_CHANNELS = 64
# Side in pixels of the square default boxes of each map. The last number only sets boxes between two sizes.
ANCHOR_SIDES = (16, 28, 44, 70, 100)


class PyramidBackbone(nn.Module):
    """MobileNetV2 features with a small top-down path; torch.fx can trace all of it.

    Attributes
    ----------
    out_channels : int
        Channels of every feature map.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = mobilenet_v2(weights=None).features[: max(TAP_CHANNELS) + 1]
        self.extra = nn.Sequential(
            Conv2dNormActivation(
                TAP_CHANNELS[17], TAP_CHANNELS[17], stride=2, groups=TAP_CHANNELS[17], activation_layer=nn.ReLU6
            ),
            Conv2dNormActivation(TAP_CHANNELS[17], EXTRA_CHANNELS, kernel_size=1, activation_layer=nn.ReLU6),
        )
        self.laterals = nn.ModuleList(
            Conv2dNormActivation(channels, PYRAMID_CHANNELS, kernel_size=1, activation_layer=None)
            for channels in (*TAP_CHANNELS.values(), EXTRA_CHANNELS)
        )
        self.out_channels = PYRAMID_CHANNELS

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Compute the feature maps.

        Parameters
        ----------
        x : Tensor
            Normalized images of shape (N, 3, H, W).

        Returns
        -------
        OrderedDict of str to Tensor
            Four maps "0" to "3", finest first, of shape (N, 64, H / s, W / s) with stride s = 8, 16, 32, 64.
        """
        taps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in TAP_CHANNELS:
                taps.append(x)
        taps.append(self.extra(x))
        merged = [lateral(tap) for lateral, tap in zip(self.laterals, taps, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            above = functional.interpolate(merged[level + 1], size=merged[level].shape[-2:], mode="nearest")
            merged[level] = merged[level] + above
        return OrderedDict((str(level), value) for level, value in enumerate(merged))


def build_detector() -> SSD:
    """Build the architecture of the bundled detector, with random weights. Nothing is downloaded.

    Returns
    -------
    torchvision.models.detection.SSD
        An SSD with an SSDLite head on `PyramidBackbone`, for images of 160 x 160 pixels and 11 classes (0 is the
        background, digit d is d + 1), in train mode.
    """
    anchors = DefaultBoxGenerator(
        aspect_ratios=[[2, 3]] * (len(TAP_CHANNELS) + 1), scales=[side / IMAGE_SIZE for side in ANCHOR_SIDES]
    )
    head = SSDLiteHead(
        [PYRAMID_CHANNELS] * (len(TAP_CHANNELS) + 1),
        anchors.num_anchors_per_location(),
        len(CLASS_NAMES),
        norm_layer=nn.BatchNorm2d,
    )
    return SSD(
        PyramidBackbone(),
        anchors,
        size=(IMAGE_SIZE, IMAGE_SIZE),
        num_classes=len(CLASS_NAMES),
        head=head,
        detections_per_img=100,
    )


def load_detector() -> SSD:
    """Load the bundled detector with trained weights, as a float32 model on the CPU, in eval mode.

    Raises
    ------
    FxpruneError
        The weights are not part of this installation.
    """
    from safetensors.torch import load

    stored = load(_read(_data() / WEIGHTS_FILE))
    detector = build_detector()
    detector.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
    )
    return detector.eval()


def load_dataset(split: Split) -> CocoDataset:
    """Load bundled images: 200 for validation ("val") or 64 others for calibration ("calibration").

    The two share no digit and no part of a photograph.

    Raises
    ------
    FxpruneError
        There is no such split, or the images are not part of this installation.
    """
    if split not in ("val", "calibration"):
        raise FxpruneError(f"There is no bundled split {split!r}; choose 'val' or 'calibration'.")
    if not (_data() / split).is_dir():
        raise _missing_error(_data() / split)
    return CocoDataset.from_folder(_data() / split)


def _data() -> Traversable:
    return resources.files("fxprune.demo") / "data"


def _read(file: Traversable) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise _missing_error(file) from error


def _missing_error(place: Traversable) -> FxpruneError:
    return FxpruneError(f"{place} is missing; reinstall fxprune, or run `python -m benchmarks.training.train_demo`.")
