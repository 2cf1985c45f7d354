"""Checks option values. The error for a removed option says what to use instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from fxprune.errors import SettingError

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

REMOVED_VALUES: dict[tuple[str, str], str] = {
    ("strategy", "greedy"): "'one_shot' was never worse, in a fraction of the time; 'search' tries more plans",
    ("heal", "norms"): "'affine' fits batch norms too, and was better in 25 of 26 measurements",
    ("criterion", "ablation"): "'fisher' was better at a fifth of the time; benchmarks/ablation.py still measures it",
}
"""Removed values of options, each with what to use instead."""

REMOVED_KEYWORDS: dict[str, str] = {
    "shapes": "only regions are removed whose shapes provably agree, as shapes='proved' did",
    "checkpoint": "healing takes minutes and starts from the beginning; leave the keyword out",
}
"""Removed keywords, each with what to use instead."""


def check_choice(option: str, value: object, known: Iterable[str], others: str = "") -> None:
    """Raise `SettingError` unless a value is one of an option's known values.

    Parameters
    ----------
    option : str
        Name of the option, for the message.
    value : object
        Value to check.
    known : iterable of str
        Known values of the option.
    others : str
        Other values that the option accepts, in words; the end of the message.

    Raises
    ------
    SettingError
        The message names the option and lists the known values. For a removed value it says what to use instead.

    Examples
    --------
    >>> check_choice("cost", "flops", ["flops", "params"])
    """
    names = list(known)
    if isinstance(value, str) and value in names:
        return
    if isinstance(value, str) and (option, value) in REMOVED_VALUES:
        raise SettingError(f"{option}={value!r} is gone: {REMOVED_VALUES[option, value]}")
    raise SettingError(f"{option} {value!r} is not known; known: {', '.join(names)}{others}")


def refuse_removed_keywords(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Make a function raise `SettingError` for removed keywords; other unknown keywords still raise `TypeError`."""

    @wraps(function)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        for keyword in kwargs:
            if keyword in REMOVED_KEYWORDS:
                raise SettingError(f"{keyword}= is gone: {REMOVED_KEYWORDS[keyword]}")
        return function(*args, **kwargs)

    return checked
