"""Matches the classes of a model with the labels of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxprune.errors import SettingError


def match_classes(model: nn.Module, dataset: Any, labels: Mapping[int, int] | None) -> dict[int, int] | None:
    """Find the label in a data set for each class of a model.

    Parameters
    ----------
    model : Module
        Its ``names``, if it has any, are its classes: a list, or a dict of class number to name.
    dataset : map-style dataset
        Its ``categories``, if it has any, are its labels: a dict of label to name. A `torch.utils.data.Subset` has
        those of its data set.
    labels : mapping of int to int, optional
        The mapping, if the caller has one: class number of the model to label in the data set.

    Returns
    -------
    dict of int to int, or None
        Class number to label. None if names or categories are not known: labels are then class numbers.

    Raises
    ------
    SettingError
        `labels` is not such a mapping, has an unknown class or label, or the names do not match.
    """
    names, categories = model_class_names(model), dataset_categories(dataset)
    if labels is not None:
        return _check_mapping(labels, names, categories)
    if names is None or categories is None:
        return None
    return _match_names(names, categories)


def model_class_names(model: nn.Module) -> dict[int, str] | None:
    """Return the names of a model's classes by number; None if it has none."""
    names = getattr(model, "names", None)
    if isinstance(names, (list, tuple)):
        names = dict(enumerate(names))
    return {int(key): str(value) for key, value in names.items()} if isinstance(names, Mapping) else None


def dataset_categories(dataset: Any) -> dict[int, str] | None:
    """Return the names of a data set's labels; None if neither it nor the data set that it is a subset of has any."""
    while not hasattr(dataset, "categories") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    categories = getattr(dataset, "categories", None)
    if categories is None:
        return None
    if not isinstance(categories, Mapping):
        raise SettingError(
            f"categories of the data set is a {type(categories).__name__}; it should be a dict of label to name"
        )
    return {int(key): str(value) for key, value in categories.items()}


def _check_mapping(
    labels: Mapping[int, int], names: Mapping[int, str] | None, categories: Mapping[int, str] | None
) -> dict[int, int]:
    if not isinstance(labels, Mapping) or not all(
        isinstance(number, int) for pair in labels.items() for number in pair
    ):
        raise SettingError(
            f"labels should be a dict of the model's class numbers to the data set's labels, got {labels!r}"
        )
    for number, label in labels.items():
        if names is not None and number not in names:
            raise SettingError(
                f"labels has class {number}, the model has {_format_names(names)}; use the model's class numbers"
            )
        if categories is not None and label not in categories:
            raise SettingError(
                f"labels maps class {number} to label {label}, the data set has {_format_names(categories)};"
                " use its labels"
            )
    return dict(labels)


def _match_names(names: Mapping[int, str], categories: Mapping[int, str]) -> dict[int, int]:
    by_name = {name: label for label, name in categories.items()}
    if len(by_name) < len(categories):
        raise SettingError(
            f"two categories of the data set have the same name: {_format_names(categories)};"
            " give the mapping with labels={class number: label}"
        )
    known = set(names.values())
    unknown = {label: name for label, name in categories.items() if name not in known}
    if unknown:
        raise SettingError(
            f"the model has no class with the name of the data set's {_format_names(unknown)}; its classes are"
            f" {_format_names(names)};"
            " give the mapping with labels={class number: label}"
        )
    return {number: by_name[name] for number, name in names.items() if name in by_name}


def _format_names(names: Mapping[int, str]) -> str:
    """Return at most six of the names, for a message."""
    shown = ", ".join(f"{number}: {name!r}" for number, name in list(names.items())[:6])
    return f"{{{shown}{f', ... {len(names)} in all' if len(names) > 6 else ''}}}"


def map_labels(found: Mapping[str, Tensor], labels: Mapping[int, int] | None) -> dict[str, Tensor]:
    """Replace the classes of detections (n,) by labels. Detections of classes without a label are removed."""
    if labels is None:
        return dict(found)
    classes = found["labels"].tolist()
    keep = [position for position, number in enumerate(classes) if number in labels]
    kept = {key: value[keep] for key, value in found.items()}
    return {**kept, "labels": found["labels"].new_tensor([labels[classes[position]] for position in keep])}


def invert_mapping(labels: Mapping[int, int] | None) -> dict[int, int] | None:
    """Return the inverse mapping, label to class number.

    Raises
    ------
    SettingError
        Two classes have one label.
    """
    if labels is None:
        return None
    inverse: dict[int, int] = {}
    for number, label in labels.items():
        if label in inverse:
            raise SettingError(
                f"classes {inverse[label]} and {number} both have label {label}: the class of its boxes is unknown;"
                " give labels={class number: label} with one class per label"
            )
        inverse[label] = number
    return inverse
