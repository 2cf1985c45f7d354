"""Makes calibration batches from a data set, in the input format of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from fxprune.adapters.protocol import Adapter
from fxprune.adapters.registry import detector_adapter, unwrap
from fxprune.datasets.class_mapping import invert_mapping, match_classes
from fxprune.errors import BatchError, SettingError


def batches(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int = 16,
    labels: Mapping[int, int] | None = None,
    image_size: int | None = None,
    targets: bool = True,
) -> Batches:
    """Make the calibration batches of a detector from a data set, for `fxprune.analyze` and `fxprune.compile`.

    Parameters
    ----------
    model : Module
        A detector of torchvision's convention, an ultralytics model or a `YOLO` object.
    dataset : map-style dataset
        Items are ``(image, target)`` as of `fxprune.CocoDataset`: a Tensor of shape (C, H, W) in [0, 1], and a
        dict of ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels and ``labels`` (n,). Boxes with ``iscrowd`` are left out.
        C is the number of channels that the model takes; for an ultralytics model of one channel, RGB becomes grey.
    batch_size : int
        Images per batch; the last batch may have fewer.
    labels : mapping of int to int, optional
        The label in the data set for each class number of the model; by default as in `fxprune.evaluate`.
    image_size : int, optional
        As for `fxprune.evaluate`.
    targets : bool
        Whether batches have boxes and classes. If not, or if the model's loss needs more (masks, key points, angles),
        the model's own confident outputs are the targets.

    Returns
    -------
    Batches
        A sequence whose batches are made when they are read. For torchvision's convention, a batch is ``(list of
        images, list of dict)``, or a list of images without targets. For ultralytics, it is ``dict(img, cls, bboxes,
        batch_idx)`` or ``dict(img)``, with images letterboxed to one square size and boxes moved accordingly.

    Raises
    ------
    BatchError
        `batch_size` is less than 1 or the data set is empty. Reading a batch raises it if an item is malformed.
    SettingError
        `labels` or `image_size` is wrong, or labels and classes cannot be matched by name.
    ModelError
        The model is not a detector.

    Examples
    --------
    >>> from fxprune.demo.bundled import load_dataset, load_detector
    >>> calibration = batches(load_detector(), load_dataset("calibration"), batch_size=8)
    >>> images, targets = calibration[0]
    >>> len(calibration), len(images), sorted(targets[0])
    (8, 8, ['boxes', 'image_id', 'labels'])
    """
    if batch_size < 1:
        raise BatchError(f"batch_size is {batch_size}; give 1 or more.")
    if not len(dataset):
        raise BatchError("the data set is empty; give at least one image")
    network = unwrap(model)
    classes = invert_mapping(match_classes(network, dataset, labels))
    return Batches(network, detector_adapter(network), dataset, batch_size, classes, image_size, targets)


@dataclass(frozen=True, eq=False, repr=False)
class Batches(Sequence[Any]):
    """Batches of a data set. A batch is made again each time it is read.

    Attributes
    ----------
    network, adapter
        The model, and its adapter.
    dataset : map-style dataset
        The images and targets.
    batch_size : int
        Images per batch.
    classes : mapping of int to int, or None
        The model's class number for each label of the data set; None if the two are equal.
    image_size : int or None
        Side in pixels of square inputs, for models that need them; None: as in the training of the model.
    targets : bool
        Whether batches have boxes and classes.
    """

    network: nn.Module
    adapter: Adapter
    dataset: Any
    batch_size: int
    classes: Mapping[int, int] | None
    image_size: int | None
    targets: bool

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __repr__(self) -> str:
        return f"<{len(self)} batches of {self.batch_size} for a {self.adapter.family}>"

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        positions = range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.dataset)))
        items = [self.dataset[position] for position in positions]
        images = [image for image, _ in items]
        if not self.targets:
            return self.adapter.collate(self.network, images, None, self.image_size)
        rows = zip(positions, items, strict=True)
        found = [_drop_crowds(target, position, self.classes) for position, (_, target) in rows]
        return self.adapter.collate(self.network, images, found, self.image_size)


def _drop_crowds(target: Mapping[str, Any], position: int, classes: Mapping[int, int] | None) -> dict[str, Any]:
    """Return a target without its crowd boxes, with the model's class numbers as labels."""
    try:
        count = len(target["boxes"])
        crowd = torch.as_tensor(target.get("iscrowd", torch.zeros(count))).bool().reshape(count)
        given: list[int] = torch.as_tensor(target["labels"]).reshape(count).tolist()
    except (TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise BatchError(
            f"Item {position} of the data set is not (image, dict with 'boxes' and 'labels'): {error!r}; convert it"
        ) from error
    kept = {
        key: value[~crowd] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for key, value in target.items()
        if key not in ("area", "iscrowd")
    }
    numbers = [
        _class_of(label, classes, position) for label, skip in zip(given, crowd.tolist(), strict=True) if not skip
    ]
    return {**kept, "labels": torch.tensor(numbers, dtype=torch.int64)}


def _class_of(label: int, classes: Mapping[int, int] | None, position: int) -> int:
    if classes is None:
        return label
    if label not in classes:
        raise SettingError(
            f"item {position} of the data set has a box of label {label}, but no class of the model has this label;"
            " add it to labels={class number: label}, or remove such boxes from the calibration data"
        )
    return classes[label]
