"""Reads folders of images, without labels or with the text files of labels in ultralytics' format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fxprune.datasets.coco import read_image
from fxprune.errors import DatasetError, warn_user

Item = tuple[Tensor, dict[str, Any]]
T = TypeVar("T")


class ImageFolder(Dataset[Item]):
    """Images of a folder, sorted by name, without labels. Items are as of `fxprune.CocoDataset`, without boxes.

    Parameters
    ----------
    folder : str or Path
        The folder.
    limit : int, optional
        Take at most so many images, evenly spread over the folder.

    Raises
    ------
    DatasetError
        The folder does not exist or contains no image. An unreadable file raises it when the item is read.

    Warns
    -----
    FxpruneWarning
        If file names have no suffix of an image format. These files are left out; the warning says how many.

    Examples
    --------
    >>> len(fxprune.ImageFolder("pictures", limit=64))              # doctest: +SKIP
    64
    """

    def __init__(self, folder: str | Path, *, limit: int | None = None) -> None:
        self.files = pick_evenly(list_images(Path(folder)), limit)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        file = self.files[index]
        return _read(file), _target(file, [])


class YoloDataset(Dataset[Item]):
    """Images with labels in ultralytics' format, described by one of its YAML files. Nothing is downloaded.

    Parameters
    ----------
    file : str or Path
        The YAML: ``path``, ``train``, ``val``, ``names``.
    split : str
        ``"train"`` or ``"val"``: a folder, a ``.txt`` list of images, or a list of these.
    limit : int, optional
        Take at most so many images, evenly spread over the split.

    Attributes
    ----------
    categories : dict of int to str
        Class numbers, from 0, and their names.

    Raises
    ------
    DatasetError
        A file is missing or malformed; the message names the file and the line. Labels are read with their image.

    Notes
    -----
    Items are as of `fxprune.CocoDataset`. The labels of ``.../images/x.jpg`` are in ``.../labels/x.txt``, one object
    per line: class number, then centre, width and height, or a polygon, divided by the image's width and height. Key
    points behind a box (``kpt_shape`` in the YAML) are not read. An
    image without such a file has no objects. Repeated lines count once.

    Examples
    --------
    >>> fxprune.YoloDataset("data.yaml", "val").categories          # doctest: +SKIP
    {0: 'person', 1: 'car'}
    """

    def __init__(self, file: str | Path, split: str, *, limit: int | None = None) -> None:
        file = Path(file)
        content = _read_yaml(file)
        self.categories = _read_names(content, file)
        parts = content.get(split)
        if not parts:
            raise DatasetError(f"{file} has no '{split}'; name the folder of its images")
        self._pose_values = math.prod(map(int, content.get("kpt_shape") or (0,)))  # per object, behind its box
        roots = _roots(file, content)
        found = [_find(str(part), roots, file) for part in (parts if isinstance(parts, list) else [parts])]
        self.files = pick_evenly([image for place in found for image in _images_of(place)], limit)
        if not any(_labels_of(image).is_file() for image in self.files):
            raise DatasetError(f"{file}: none of the {len(self.files)} images has labels ({_labels_of(self.files[0])})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        image = _read(self.files[index])
        size = torch.tensor([image.shape[-1], image.shape[-2]] * 2, dtype=torch.float32)
        rows = _read_labels(_labels_of(self.files[index]), len(self.categories), self._pose_values)
        return image, _target(self.files[index], rows, size)


def pick_evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` items, evenly spread; all of them for None.

    Raises
    ------
    DatasetError
        If `limit` is no positive number.

    Examples
    --------
    >>> pick_evenly("abcdef", 3)
    ['a', 'c', 'e']
    """
    if limit is not None and limit < 1:
        raise DatasetError(f"limit is {limit}; give the number of images to take, 1 or more, or None for all")
    count = len(items)
    if limit is None or count <= limit:
        return list(items)
    return [items[index * count // limit] for index in range(limit)]


def list_images(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted by name; errors and warnings are those of `ImageFolder`."""
    if not folder.is_dir():
        raise DatasetError(f"{folder} is no folder; give the folder with the images")
    suffixes = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in suffixes]
    if not images:
        raise DatasetError(f"{folder} holds no image among its {len(files)} files")
    if others := [path.name for path in files if path not in set(images)]:
        text = f"{folder}: {len(others)} file(s) without the suffix of images are left out, first {others[0]}"
        warn_user(text)
    return images


def _read(file: Path) -> Tensor:
    return read_image(file, {"id": file.name, "width": None, "height": None})


def _target(file: Path, rows: Iterable[tuple[float, ...]], size: Tensor | None = None) -> dict[str, Any]:
    """Return boxes in pixels and labels, from rows (class, x1, y1, x2, y2) in [0, 1]."""
    table = torch.tensor(list(rows), dtype=torch.float32).reshape(-1, 5)
    boxes = table[:, 1:] if size is None else table[:, 1:] * size
    return {"boxes": boxes, "labels": table[:, 0].long(), "image_id": file.name}


# Ultralytics' files --------------------------------------------------------------------------------------------------


def _read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read ({error.strerror}); give the data set's .yaml") from error
    if not isinstance(content, Mapping):
        raise DatasetError(f"{file} is not a data set in ultralytics' format: it has no 'train', 'val' and 'names'")
    return content


def _read_names(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or sorted(names, key=str) != sorted(range(len(names)), key=str):
        raise DatasetError(f"{file}: 'names' should be the names of the classes 0, 1, ..., is {names!r}")
    return {int(number): str(name) for number, name in names.items()}


def _roots(file: Path, content: Mapping[str, Any]) -> list[Path]:
    """Return the folders that paths of splits may be relative to."""
    root = Path(str(content.get("path") or "."))
    return [file.parent / root, Path.cwd() / root]


def _find(part: str, roots: list[Path], file: Path) -> Path:
    for spelled in (part, part.removeprefix("../")):
        for root in roots:
            if (root / spelled).exists():
                return root / spelled
    raise DatasetError(f"{file}: {roots[0] / part} is missing; correct the path (nothing is downloaded)")


def _images_of(place: Path) -> list[Path]:
    if place.is_dir():
        return list_images(place)
    lines = place.read_text(encoding="utf-8").split("\n")
    files = [place.parent / line.strip() for line in lines if line.strip()]
    if not files:
        raise DatasetError(f"{place} lists no image")
    return files


def _labels_of(image: Path) -> Path:
    """Return the file of an image's labels: the last folder named images is replaced by labels."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_labels(file: Path, classes: int, pose_values: int = 0) -> list[tuple[float, ...]]:
    """Return rows (class, x1, y1, x2, y2) in [0, 1], without duplicates."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = [_read_row(line, f"{file}, line {number}", classes, pose_values) for number, line in numbered]
    return list(dict.fromkeys(rows))


def _read_row(line: str, where: str, classes: int, pose_values: int = 0) -> tuple[float, ...]:
    try:
        number, *values = map(float, line.split())
    except ValueError as error:
        raise DatasetError(f"{where}: not numbers ({error}); a line is class, x, y, width, height") from error
    if pose_values and len(values) == 4 + pose_values:
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DatasetError(f"{where}: {len(values) + 1} numbers; a line is class, x, y, width, height, or a polygon")
    if number not in range(classes):
        raise DatasetError(f"{where}: class {number:g}, but the classes are 0 to {classes - 1}")
    if not all(math.isfinite(value) and -0.01 <= value <= 1.01 for value in values):
        raise DatasetError(f"{where}: a coordinate is not in [0, 1]; divide by the image's width and height")
    if len(values) > 4:
        corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        x, y, width, height = values
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        raise DatasetError(f"{where}: the box has no width or no height; remove it")
    return (number, *corners)
