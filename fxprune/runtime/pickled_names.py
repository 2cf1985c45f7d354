"""Functions of this package in pickles. Where the package is missing, reading the pickle says what to install."""

from __future__ import annotations

import pydoc
from collections.abc import Callable
from typing import Any

NEEDED = "this model was pruned, and opening it needs fxprune: pip install fxprune"
"""Name of the attribute that a pickle reads. It ends the error where the package is missing."""


class PickledName:
    """Decorates a function that restores an object from a pickle.

    By itself, pickle would raise `ModuleNotFoundError` where this package is missing. ultralytics answers that by
    starting a package manager. With the decorator, pickle finds the function by `pydoc.locate`, which returns None
    there, and reads an attribute of it. The error is then an `AttributeError` that ends in `NEEDED`.

    Examples
    --------
    >>> @PickledName
    ... def restore(value):
    ...     return value
    >>> restore(3)
    3
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = OptionalName(function.__module__, function.__qualname__)
        setattr(self, NEEDED, self)

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path of the function."""
        return getattr, (self.name, NEEDED)


class OptionalName:
    """A value of this package that a pickle names. Where the package is missing, None is read in its place.

    Parameters
    ----------
    module, name : str
        Module and name of the value. Reading the pickle imports the module.
    """

    def __init__(self, module: str, name: str) -> None:
        self.path = f"{module}.{name}"

    def __deepcopy__(self, memo: dict[int, Any]) -> OptionalName:
        """Return the object itself."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path."""
        return pydoc.locate, (self.path,)
