"""Opens the images, and checks that the model fits them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize

from fxprune.adapters.registry import unwrap
from fxprune.adapters.ultralytics import adapter as ultralytics
from fxprune.cli.options import DataOptions, ModelOptions
from fxprune.datasets.batches import batches
from fxprune.datasets.class_mapping import dataset_categories, model_class_names
from fxprune.datasets.coco import CocoDataset
from fxprune.datasets.folders import ImageFolder, YoloDataset, pick_evenly
from fxprune.demo.bundled import load_dataset
from fxprune.errors import DatasetError, SettingError
from fxprune.graph.fx_utils import class_names
from fxprune.search.measurement import MAX_IMAGES

Split = Literal["calibration", "val"]
CALIBRATION_IMAGES, HEALING_IMAGES = 64, 256
"""Default numbers of images for scoring and for healing; --limit replaces them."""
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the pixels in the training data of torchvision's classifiers."""
_CLASS_COUNTS = (
    "head.classification_head.num_classes",
    "head.classification_head.num_columns",
    "roi_heads.box_predictor.cls_score.out_features",
)
"""Attributes of torchvision's detectors that hold their number of classes."""


@dataclass(frozen=True)
class EvaluationImages:
    """Images for a model.

    Attributes
    ----------
    dataset : map-style dataset
        Its items have the format of `fxprune.CocoDataset`.
    labelled : bool
        Whether the images have true boxes.
    labels : mapping of int to int, or None
        Maps the model's class numbers to the data set's labels; an argument of `fxprune.evaluate`.
    """

    dataset: Any
    labelled: bool
    labels: Mapping[int, int] | None


def check_data(model: ModelOptions, data: DataOptions, boxes: bool = False) -> None:
    """Reject data options that exclude each other or are missing, before anything is loaded.

    Raises
    ------
    typer.BadParameter
        If there are such options; the message names the right ones.
    """
    if data.data is not None and (data.images or data.annotations):
        raise typer.BadParameter("--data cannot be combined with --images or --annotations")
    if data.annotations is not None and data.images is None:
        raise typer.BadParameter("--annotations needs the --images folder as well")
    if data.data is None and data.images is None and model.model != "bundled":
        raise typer.BadParameter(
            f"the model {model.model} needs images: --images FOLDER, with --annotations FILE.json if they have labels,"
            " or --data FILE.yaml (only the bundled model has its own images)"
        )
    if boxes and data.images is not None and data.annotations is None:
        raise typer.BadParameter(
            "mAP needs true boxes: give --annotations FILE.json of the --images, or --data FILE.yaml"
        )


def open_images(model: nn.Module, options: DataOptions, split: Split, heal: str = "none") -> EvaluationImages:
    """Open the images that the options name, and check that the classes of the model match.

    Raises
    ------
    DatasetError
        If the images cannot be read.
    SettingError
        If the model's classes differ from the data set's.
    """
    dataset = _open_dataset(options, split)
    most = options.limit or (_enough(heal) if split == "calibration" else len(dataset))
    return _make_images(unwrap(model), dataset, _spread(range(len(dataset)), most))


def open_unused_images(model: nn.Module, options: DataOptions, heal: str) -> EvaluationImages | None:
    """Open images that `open_images` does not pick for the calibration; None if there are no others.

    They are of the split for validation if there is one, or else of the same images as the calibration.
    """
    most = min(options.limit or MAX_IMAGES, MAX_IMAGES)
    dataset = _open_dataset(options, "calibration")
    used = {_file_of(dataset, index) for index in _spread(range(len(dataset)), options.limit or _enough(heal))}
    splits: tuple[Split, ...] = ("val", "calibration")
    for split in splits:
        with contextlib.suppress(DatasetError):  # the data set has no split for validation
            dataset = _open_dataset(options, split)
            left = [index for index in range(len(dataset)) if _file_of(dataset, index) not in used]
            if left:
                return _make_images(unwrap(model), dataset, _spread(left, most))
    return None


def _file_of(dataset: Any, index: int) -> Any:
    """Return the file of an item; of a `CocoDataset` its folder and number."""
    return (str(dataset.images), index) if isinstance(dataset, CocoDataset) else dataset.files[index]


def _open_dataset(options: DataOptions, split: Split) -> Any:
    if options.data is not None:
        return YoloDataset(options.data, "train" if split == "calibration" else split)
    if options.annotations is not None:
        return CocoDataset(str(options.images), str(options.annotations))
    return load_dataset(split) if options.images is None else ImageFolder(options.images)


def _make_images(network: nn.Module, dataset: Any, picked: Sequence[int]) -> EvaluationImages:
    """Return some images of a data set, after a check that its classes match the model's."""
    labels = _match_numbers(network, dataset) if isinstance(dataset, YoloDataset) else None
    _check_classes(network, dataset, 0 if labels is None else 1)
    some = dataset if len(picked) == len(dataset) else Subset(dataset, picked)
    return EvaluationImages(some, not isinstance(dataset, ImageFolder), labels)


def _enough(heal: str) -> int:
    return CALIBRATION_IMAGES if heal == "none" else HEALING_IMAGES


def _spread(items: Sequence[int], most: int) -> Sequence[int]:
    """Return at most `most` items, evenly spread."""
    return items if len(items) <= most else pick_evenly(items, most)


def _match_numbers(network: nn.Module, dataset: YoloDataset) -> dict[int, int] | None:
    """Match classes by number if the model has no class names: ultralytics counts from 0, torchvision from 1."""
    names = model_class_names(network)
    if names is not None and any(name != str(number) for number, name in names.items()):
        return None
    first = 0 if ultralytics.ADAPTER.matches(network, None) else 1
    return {label + first: label for label in dataset.categories}


def _check_classes(network: nn.Module, dataset: Any, shift: int) -> None:
    """Reject labels above the number of classes of a torchvision detector without class names.

    Class names are compared elsewhere.
    """
    categories = dataset_categories(dataset)
    if categories is None or model_class_names(network) is not None:
        return
    for path in _CLASS_COUNTS:
        try:
            count = int(attrgetter(path)(network))
        except AttributeError:
            continue
        highest = max(categories, default=0) + shift
        if highest >= count:
            raise SettingError(
                f"this {type(network).__name__} does not fit the data: it has classes 1 to {count - 1} (0 is the"
                f" background), the labels of the data set go up to {highest}; build it with --classes {highest + 1}"
                " and weights trained for that number"
            )


# Batches -------------------------------------------------------------------------------------------------------------


def calibration_batches(model: nn.Module, pictures: EvaluationImages, options: DataOptions) -> Sequence[Any]:
    """Make the batches for `fxprune.analyze`, for any kind of model."""
    network = unwrap(model)
    check_size(network, options.size)
    if _is_classifier(network):
        return _ClassifierBatches(pictures.dataset, options.batch, options.size or 224)
    return batches(
        model,
        pictures.dataset,
        batch_size=options.batch,
        labels=pictures.labels,
        image_size=options.size,
        targets=pictures.labelled,
    )


def check_size(network: nn.Module, size: int | None) -> None:
    """Reject --size for a model that would ignore it."""
    if size is not None and not ultralytics.ADAPTER.matches(network, None) and not _is_classifier(network):
        raise SettingError(f"--size cannot be used with {type(network).__name__}, which sizes its images itself")


def _is_classifier(network: nn.Module) -> bool:
    """Return whether a model is one of torchvision's classifiers."""
    names = class_names(network)
    others = tuple(f"torchvision.models.{part}." for part in ("detection", "segmentation", "video", "optical_flow"))
    return any(name.startswith("torchvision.models.") and not name.startswith(others) for name in names)


@dataclass(frozen=True, eq=False)
class _ClassifierBatches(Sequence[Tensor]):
    """Square images without labels, with the preprocessing of torchvision's classifiers."""

    dataset: Any
    batch_size: int
    side: int

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        prepare = Compose([Resize(round(self.side / 0.875)), CenterCrop(self.side), Normalize(*IMAGENET_MEAN_STD)])
        start = range(len(self))[index] * self.batch_size
        stop = min(start + self.batch_size, len(self.dataset))
        return torch.stack([prepare(self.dataset[position][0]) for position in range(start, stop)])
