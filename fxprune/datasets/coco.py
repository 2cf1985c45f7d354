"""Reads images with boxes in COCO format."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from fxprune.errors import DatasetError, warn_user

ANNOTATION_PARTS = ("images", "annotations", "categories")


class Box(NamedTuple):
    """One annotation: left, top, width, height and area in pixels, category id, 1 for a crowd."""

    xywh: tuple[float, float, float, float]
    category: int
    area: float
    crowd: int


class CocoDataset(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images with boxes: a folder of images, and one file of annotations in COCO's JSON format.

    Parameters
    ----------
    images : str or Traversable
        Folder of the image files: a path, or a folder inside an installed package (`importlib.resources`).
    annotations : str or Traversable
        The JSON file, with ``images``, ``annotations`` and ``categories``.
    limit : int, optional
        Maximum number of images; the first ones in the file are used.

    Attributes
    ----------
    categories : dict of int to str
        Names of the category ids.

    Raises
    ------
    DatasetError
        A file is missing or malformed, or the annotations are inconsistent; the message names the file and the entry.
        A missing or unreadable image file raises it when the item is read.

    Warns
    -----
    FxpruneWarning
        If boxes have no positive width and height (COCO's train set has some). They are left out; the warning says how
        many.

    Notes
    -----
    An item is ``(image, target)``: a float32 RGB Tensor of shape (3, H, W) in [0, 1], and a dict of

    - ``boxes`` (n, 4) float32: x1, y1, x2, y2 in pixels,
    - ``labels`` (n,) int64: category ids of the file,
    - ``area`` (n,) float32: area of the object in pixels (in COCO, of its outline, not of its box),
    - ``iscrowd`` (n,) int64: 1 if the box is of a crowd; evaluation ignores it, `fxprune.batches` leaves it out,
    - ``image_id`` int.

    The annotations are read and indexed once. Images are decoded when an item is read. Orientation tags (EXIF) are not
    applied. An image whose size differs from that in the annotations is an error.

    Examples
    --------
    >>> from importlib import resources
    >>> folder = resources.files("fxprune.demo") / "data" / "val"
    >>> dataset = CocoDataset(folder / "images", folder / "annotations.json", limit=10)
    >>> image, target = dataset[0]
    >>> len(dataset), image.shape, target["boxes"].shape[1]
    (10, torch.Size([3, 160, 160]), 4)
    """

    def __init__(self, images: str | Traversable, annotations: str | Traversable, *, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise DatasetError(f"limit is {limit}; give the number of images to take, 1 or more, or None for all")
        file = _path(annotations)
        self.images = _path(images)
        if not self.images.is_dir():
            raise DatasetError(f"{self.images} is no folder; give the folder with the images of {file}")
        parts = _read_parts(file)
        self.categories = _read_categories(parts["categories"], file)
        records = _read_images(parts["images"], file)
        self._boxes = _read_boxes(parts["annotations"], records, self.categories, file)
        self._records = list(records.values())[:limit]

    @classmethod
    def from_folder(cls, folder: str | Traversable, *, limit: int | None = None) -> CocoDataset:
        """Open a folder with ``images/`` and ``annotations.json``.

        Examples
        --------
        >>> from importlib import resources
        >>> len(CocoDataset.from_folder(resources.files("fxprune.demo") / "data" / "val"))
        200
        """
        return cls(_path(folder) / "images", _path(folder) / "annotations.json", limit=limit)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        record = self._records[index]
        found = self._boxes.get(record["id"], [])
        boxes = torch.tensor([box.xywh for box in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([box.category for box in found], dtype=torch.int64),
            "area": torch.tensor([box.area for box in found], dtype=torch.float32),
            "iscrowd": torch.tensor([box.crowd for box in found], dtype=torch.int64),
            "image_id": record["id"],
        }
        return read_image(self.images / record["file_name"], record), target


def _path(place: str | Traversable) -> Traversable:
    return Path(place) if isinstance(place, str) else place


def _read_parts(file: Traversable) -> dict[str, list[Any]]:
    """Return the three lists of an annotations file."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DatasetError(f"{file} is missing; give the COCO annotations (.json) of the images") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read as JSON ({error}); give the COCO annotations (.json)") from error
    for part in ANNOTATION_PARTS:
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise DatasetError(
                f"{file} has no list '{part}'; COCO annotations are one object with the lists"
                f" {', '.join(ANNOTATION_PARTS)}"
            )
    return {part: content[part] for part in ANNOTATION_PARTS}


def _read_categories(entries: Iterable[Any], file: Traversable) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), int) or "name" not in entry:
            raise DatasetError(f"{file}: category {number} is {entry!r}; it needs an integer 'id' and a 'name'")
        if entry["id"] in categories:
            raise DatasetError(f"{file}: two categories have the id {entry['id']}; ids must be unique")
        categories[entry["id"]] = str(entry["name"])
    return categories


def _read_images(entries: Iterable[Any], file: Traversable) -> dict[int, dict[str, Any]]:
    """Return the id, file name and size (if known) of every image, by id."""
    records: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not {"id", "file_name"} <= set(entry):
            raise DatasetError(f"{file}: image {number} is {str(entry)[:200]}; it needs an 'id' and a 'file_name'")
        if entry["id"] in records:
            raise DatasetError(f"{file}: two images have the id {entry['id']}; ids must be unique")
        records[entry["id"]] = {key: entry.get(key) for key in ("id", "file_name", "width", "height")}
    return records


def _read_boxes(
    entries: Iterable[Any], images: Mapping[int, Any], categories: Mapping[int, str], file: Traversable
) -> dict[int, list[Box]]:
    """Return the boxes of every image with boxes, by the id of the image."""
    boxes: dict[int, list[Box]] = {}
    dropped: list[str] = []
    for number, entry in enumerate(entries):
        name = f"annotation {entry.get('id', number) if isinstance(entry, Mapping) else number}"
        box = _read_box(entry, f"{file}: {name}")
        if entry["image_id"] not in images:
            raise DatasetError(
                f"{file}: {name} has image {entry['image_id']}, which is not in 'images'; remove it or add the image"
            )
        if box.category not in categories:
            raise DatasetError(
                f"{file}: {name} has the category {box.category}, which is not in 'categories'"
                f" ({sorted(categories)[:10]}...); correct it or add the category"
            )
        if min(box.xywh[2:]) > 0:
            boxes.setdefault(entry["image_id"], []).append(box)
        else:
            dropped.append(f"{name} (image {entry['image_id']}, bbox {list(box.xywh)})")
    if dropped:
        warn_user(
            f"{file}: {len(dropped)} box(es) without a positive width and height are left out, first {dropped[0]}"
        )
    return boxes


def _read_box(entry: Any, name: str) -> Box:
    missing = {"image_id", "bbox", "category_id"} - set(entry if isinstance(entry, Mapping) else ())
    if missing:
        raise DatasetError(f"{name} lacks {sorted(missing)}; every annotation needs image_id, category_id and bbox")
    try:
        x, y, width, height = map(float, entry["bbox"])
        area = float(entry.get("area", width * height))
        box = Box((x, y, width, height), int(entry["category_id"]), area, int(entry.get("iscrowd", 0)))
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"{name} has a wrong number ({error}); bbox is [left, top, width, height] in pixels"
        ) from error
    if not all(map(math.isfinite, (*box.xywh, area))):
        raise DatasetError(f"{name} contains NaN or infinity: bbox {entry['bbox']}, area {area}; correct or remove it")
    return box


def read_image(file: Traversable, record: Mapping[str, Any]) -> Tensor:
    """Return the pixels as float32 of shape (3, H, W) in [0, 1]."""
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            pixels: Tensor = pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError as error:
        raise DatasetError(
            f"{file} is missing: image {record['id']} of the annotations; give the folder that contains it"
        ) from error
    except (OSError, ValueError, SyntaxError, ImportError) as error:  # ultralytics' Image.open asks for a plugin
        reason = "its format is not known" if isinstance(error, (UnidentifiedImageError, ImportError)) else error
        raise DatasetError(f"{file}, image {record['id']}, cannot be read as an image: {reason}; replace it") from error
    height, width = pixels.shape[-2:]
    if record["width"] not in (None, width) or record["height"] not in (None, height):
        raise DatasetError(
            f"{file} is {width} x {height} pixels, but the annotations say {record['width']} x {record['height']} of"
            f" image {record['id']}: its boxes would be misplaced (resized, or rotated by an EXIF tag?); correct either"
        )
    return pixels.float() / 255
