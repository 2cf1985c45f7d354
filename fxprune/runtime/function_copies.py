"""Copies the functions that are set on the modules of a copied network, so that they refer to the copy.

`copy.deepcopy` does not copy functions. A function that was set as a module's `forward` or as a hook keeps what it
refers to: in its closure, its default arguments and its global variables. In a copy of the network it would call the
layers of the original.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

CONTAINERS = (list, tuple, set, dict)


def rebind_functions(twin: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let the functions in a network's attributes and hooks refer to the network itself, not to its original.

    Parameters
    ----------
    twin : Module
        A network made by ``copy.deepcopy(original, memo)``. It is changed.
    memo : mapping of int to object
        The copies by the `id` of their originals, as `copy.deepcopy` leaves them.

    Examples
    --------
    >>> layer, memo = nn.Linear(2, 2), {}
    >>> layer.forward = lambda x: layer.weight.sum() * x
    >>> twin = copy.deepcopy(layer, memo)                          # doctest: +SKIP
    >>> rebind_functions(twin, memo)                               # doctest: +SKIP
    """
    copies = {key: value for key, value in memo.items() if key != id(memo)}  # that entry keeps originals alive
    rebinder = _Rebinder(copies)
    for holder in [*twin.modules(), *copies.values()]:
        if type(holder) is list:
            holder[:] = map(rebinder.rebind, holder)
        elif type(holder) is dict:
            rebinder.change_items(holder)
        elif not isinstance(holder, type) and hasattr(holder, "__dict__"):
            rebinder.change_items(vars(holder))
            for value in vars(holder).values():
                if isinstance(value, dict):  # the hooks of a module
                    rebinder.change_items(value)


class _Rebinder:
    """Makes values that refer to copies from values that refer to originals.

    Attributes
    ----------
    copies : mapping of int to object
        The copies by the `id` of their originals.
    done : dict of int to tuple
        Every value that was rebuilt, with the new one, by its `id`.
    """

    def __init__(self, copies: Mapping[int, Any]) -> None:
        self.copies = copies
        self.done: dict[int, tuple[Any, Any]] = {}

    def change_items(self, values: dict[Any, Any]) -> None:
        """Replace the values of a dict that refer to originals."""
        for key, value in list(values.items()):
            changed = self.rebind(value)
            if changed is not value:
                values[key] = changed

    def rebind(self, value: Any) -> Any:
        """Return a value that refers to copies; the same object if it refers to no original."""
        if id(value) in self.copies:
            return self.copies[id(value)]
        if id(value) in self.done:
            return self.done[id(value)][1]
        if not self._refers_to_original(value):
            return value
        if isinstance(value, FunctionType):
            return self._rebuild_function(value)
        if isinstance(value, MethodType):
            new: Any = MethodType(self.rebind(value.__func__), self.rebind(value.__self__))
        elif isinstance(value, functools.partial):
            new = type(value)(self.rebind(value.func), *map(self.rebind, value.args))
            new.keywords.update({key: self.rebind(item) for key, item in value.keywords.items()})
            vars(new).update({key: self.rebind(item) for key, item in vars(value).items()})
        elif isinstance(value, dict):
            new = {key: self.rebind(item) for key, item in value.items()}
        else:
            new = type(value)(map(self.rebind, value))
        self.done[id(value)] = value, new
        return new

    def _rebuild_function(self, old: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in old.__closure__ or ())
        changed = {name: self.rebind(value) for name, value in _global_values(old)}
        changed = {name: value for name, value in changed.items() if value is not old.__globals__[name]}
        scope = {**old.__globals__, **changed} if changed else old.__globals__
        new = FunctionType(old.__code__, scope, old.__name__, old.__defaults__, cells or None)
        self.done[id(old)] = old, new  # before its closure is filled: it may refer to itself
        for cell, before in zip(cells, old.__closure__ or (), strict=True):
            if not _is_empty(before):
                cell.cell_contents = self.rebind(before.cell_contents)
        new.__defaults__ = self.rebind(old.__defaults__)
        new.__kwdefaults__ = self.rebind(old.__kwdefaults__)
        vars(new).update({key: self.rebind(item) for key, item in vars(old).items()})
        new.__qualname__, new.__module__, new.__doc__ = old.__qualname__, old.__module__, old.__doc__
        new.__annotations__ = old.__annotations__
        return new

    def _refers_to_original(self, value: Any) -> bool:
        waiting, seen = [value], set[int]()
        while waiting:
            value = waiting.pop()
            if id(value) in self.copies:
                return True
            if id(value) not in seen:
                seen.add(id(value))
                waiting += _parts(value)
        return False


def _parts(value: Any) -> Iterator[Any]:
    """Yield what a function, a bound method, a partial or a container refers to."""
    if isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell))
        yield from (value.__defaults__, value.__kwdefaults__, vars(value))
        yield from (found for _, found in _global_values(value))
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords, vars(value))
    elif type(value) in CONTAINERS:
        yield from value.values() if isinstance(value, dict) else value


def _global_values(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the global variables that a function reads and that are modules, or methods of them, with their names."""
    for name in dict.fromkeys(_global_names(function.__code__)):
        value = function.__globals__.get(name)
        if isinstance(value, (nn.Module, MethodType, functools.partial)):
            yield name, value


def _global_names(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _is_empty(cell: CellType) -> bool:
    """Whether a cell holds nothing yet: its variable is assigned later, or was deleted."""
    try:
        return bool(cell.cell_contents is cell)
    except ValueError:
        return True
