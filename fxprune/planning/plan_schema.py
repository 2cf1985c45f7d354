"""Reads dataclasses from plain data with a check of every field, and writes JSON with one row per line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from fxprune.capture.module_trace import is_constant
from fxprune.errors import FxpruneError


def read_record(
    kind: Any, row: Any, where: str, fail: Callable[[str], FxpruneError], added: Mapping[str, Any] | None = None
) -> Any:
    """Build a dataclass from plain data; lists become tuples.

    Parameters
    ----------
    kind : dataclass type
        The type of the record. Values are checked by the annotations of its fields, see `FORMS`. Fields with other
        annotations are not checked.
    row : mapping
        A value for each field.
    where : str
        Name of the record in its file, for messages.
    fail : callable
        ``(text) -> FxpruneError``: builds the error to raise.
    added : mapping, optional
        Values of fields that older files do not have.

    Returns
    -------
    kind
        The record.

    Raises
    ------
    FxpruneError
        The output of `fail`, if a field is missing, unknown, or of another type. The message names the field.
    """
    if not isinstance(row, Mapping):
        raise fail(f"field {where!r} should be an object")
    expected = {field.name: str(field.type) for field in fields(kind)}
    row = {**{name: value for name, value in (added or {}).items() if name in expected}, **row}
    if missing := sorted(set(expected) - set(row)):
        raise fail(f"field {where!r} lacks {missing}")
    if unknown := sorted(set(row) - set(expected)):
        raise fail(f"field {where!r} has unknown {unknown}")
    for name, annotation in expected.items():
        bare = annotation.removesuffix(" | None")
        if bare in FORMS and not (row[name] is None and bare != annotation):
            words, fits = FORMS[bare]
            if not fits(row[name]):
                raise fail(f"field '{where}.{name}' should be {words}, is {row[name]!r}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})


def encode_json(data: Mapping[str, Any]) -> str:
    """Return an object as JSON text, with one line per field and per row of a list."""

    def encode(value: Any) -> str:
        rows = isinstance(value, list) and value
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if rows else json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {encode(value)}" for name, value in data.items()) + "\n}\n"


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)


def _is_mapping_to(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(isinstance(item, kind) for item in value.values())


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_constant(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    return is_constant(value)


FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("str", lambda value: isinstance(value, str)),
    "bool": ("bool", lambda value: isinstance(value, bool)),
    "int": ("int", lambda value: _is_number(value, int)),
    "float": ("float", lambda value: _is_number(value, int, float)),
    "Mapping[str, Any]": ("an object", lambda value: isinstance(value, Mapping)),
    "Mapping[str, str]": ("an object of strings", _is_mapping_to(str)),
    "Mapping[str, Constant]": (
        "an object of constants",
        lambda value: isinstance(value, Mapping) and all(map(_is_constant, value.values())),
    ),
    "tuple[str, ...]": ("a list of strings", _is_list_of(str)),
    "tuple[int, ...]": ("a list of integers", _is_list_of(int)),
}
"""By the annotation of a field: the expected type in words, and a function that checks a value."""
