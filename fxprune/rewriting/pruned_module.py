"""Modules that a rewrite puts in the place of others: `PrunedModule` with a new forward, `PassThrough` without work."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from fxprune.runtime.pickled_names import PickledName
from fxprune.runtime.torch_internals import COMPILED_CALL

MISSING_ARGUMENT = "a call without the argument {name!r} reached a removed block, which returns that argument"


class PassThrough(nn.Module):
    """Return one of the arguments unchanged. It replaces a removed block for which `Identity` would not do.

    The block takes several arguments, returns a tuple, or its output is contiguous where its input is not.

    Parameters
    ----------
    position : int
        Position of the returned argument in a call.
    name : str
        Name of the returned argument, for calls by keyword.
    form : tuple or list, optional
        What the block returned, if that was not one tensor: a tuple or a list with `PassThrough.SLOT` at the place of
        the argument and constants elsewhere.
    contiguous : bool
        Whether the argument is made contiguous: the block's output was, and what reads it needs that.

    Examples
    --------
    >>> layer = PassThrough(0, "hidden")
    >>> layer(torch.zeros(1), mask=None), layer
    (tensor([0.]), PassThrough(returns='hidden'))
    """

    SLOT = "<argument>"

    def __init__(self, position: int, name: str, form: Any = None, contiguous: bool = False) -> None:
        super().__init__()
        self.position, self.name, self.form, self.contiguous = position, name, form, contiguous

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the argument, in the form of the replaced block's output."""
        if len(args) <= self.position and self.name not in kwargs:
            raise TypeError(MISSING_ARGUMENT.format(name=self.name))
        value = args[self.position] if len(args) > self.position else kwargs[self.name]
        value = value.contiguous() if self.contiguous else value
        if self.form is None:
            return value
        return type(self.form)(value if item == self.SLOT else item for item in self.form)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the attributes."""
        return _restore_pass_through, (), vars(self)

    def extra_repr(self) -> str:
        """Name the argument."""
        form = "" if self.form is None else f", in a {type(self.form).__name__}"
        return f"returns={self.name!r}{form}{', contiguous' if self.contiguous else ''}"


class PrunedModule(fx.GraphModule):
    """A module of which a part was removed. Its forward is a graph; everything else is that of the original module.

    It has the original's submodules, parameters, buffers, hooks, attributes and mode, except those that were removed.
    Methods and class attributes of the original class work too. Methods that read a removed or a changed part raise
    `AttributeError`: they were written for the original.

    It can be copied, pickled and loaded as often as needed.

    Parameters
    ----------
    original : Module
        The module to replace. It is not changed; its submodules are shared.
    graph : Graph
        The new forward. Its targets are paths below the original module.
    changed : collection of str
        Paths below the original module of layers that were removed or replaced.

    Attributes
    ----------
    original_class : type
        Class of the original module.
    changed_names : frozenset of str
        Names of the attributes that hold removed or replaced parts.

    Examples
    --------
    >>> pruned.neck.block                                          # doctest: +SKIP
    C2f(...)
    """

    original_class: type[nn.Module]
    changed_names: frozenset[str]

    def __init__(self, original: nn.Module, graph: fx.Graph, changed: Collection[str] = ()) -> None:
        kind = type(original)
        if isinstance(original, fx.GraphModule):
            kind = original.original_class if isinstance(original, PrunedModule) else fx.GraphModule
        names = {path.partition(".")[0] for path in changed}
        super().__init__(nn.Module(), fx.Graph(), type(original).__name__)
        state = {key: value for key, value in vars(original).items() if key not in _GRAPH_STATE}
        state = {key: _copy_registry(value) for key, value in state.items() if not _holds_modules(value)}
        state = {key: _rebind(value, original, self) for key, value in state.items()}
        earlier: frozenset[str] = original.changed_names if isinstance(original, PrunedModule) else frozenset()
        vars(self).update(state, original_class=kind, changed_names=frozenset(names) | earlier)
        _adopt_overrides(type(self), kind)
        self.graph = graph

    def __getattr__(self, name: str) -> Any:
        """Look up a submodule, a tensor, or an attribute of the original class."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind, changed = vars(self).get("original_class"), vars(self).get("changed_names", ())
        if kind is None:
            raise AttributeError(name)
        if name in changed:
            raise AttributeError(f"{name!r} of this {kind.__name__} was removed when the model was pruned")
        missing = object()
        found = inspect.getattr_static(kind, name, missing)
        if found is missing or name == "forward":
            raise AttributeError(f"{kind.__name__!r} object, which was pruned, has no attribute {name!r}")
        if read := sorted(_names_in(found) & set(changed)):
            raise AttributeError(
                f"{kind.__name__}.{name} reads {', '.join(map(repr, read))}, which changed when the model was pruned;"
                " call the module itself, or this method of the original model"
            )
        return found.__get__(self, type(self)) if hasattr(found, "__get__") else found

    def __dir__(self) -> list[str]:
        """List the attributes, with those of the original class."""
        return sorted({*nn.Module.__dir__(self), *dir(self.original_class)})  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the graph as rows of plain values."""
        return _restore_module, (type(self).__name__, self.original_class), self.__getstate__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph as rows of plain values."""
        return self.__reduce_ex__(2)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, with the graph as rows."""
        state = {key: value for key, value in vars(self).items() if key not in _GRAPH_STATE}
        return {**state, _ROWS: list(graph_to_rows(self.graph))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes and the graph."""
        state = dict(state)
        rows = state.pop(_ROWS)
        vars(self).update(state)
        _adopt_overrides(type(self), self.original_class)
        self.graph = rows_to_graph(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        """Copy all attributes and the graph."""
        new = _blank(type(self).__name__, self.original_class)
        memo[id(self)] = new
        new.__setstate__({key: value if key == _ROWS else copy.deepcopy(value, memo) for key, value in self._items()})
        return new

    def __copy__(self) -> PrunedModule:
        """Copy the module; the copy shares the submodules and tensors."""
        new = _blank(type(self).__name__, self.original_class)
        new.__setstate__({key: _copy_registry(value) for key, value in self._items()})
        return new

    def _items(self) -> list[tuple[str, Any]]:
        return list(self.__getstate__().items())


_MODULE_STATE = frozenset(vars(nn.Module())) | {"forward", "meta", "save_pretrained"}
_ROWS = "graph_rows"
_BLANK = fx.GraphModule(nn.Module(), fx.Graph())
_GRAPH_STATE = frozenset(vars(_BLANK)) - frozenset(vars(nn.Module())) - {"meta"} | {
    COMPILED_CALL,
    "forward",
}
"""Attributes that belong to a graph or to a compiled or replaced forward, and that a new module makes itself."""


def _blank(name: str, kind: type[nn.Module]) -> PrunedModule:
    """Return a module without state. Its class is known, so that a pickle can restore bound methods first."""
    new = PrunedModule.__new__(PrunedModule)
    fx.GraphModule.__init__(new, nn.Module(), fx.Graph(), name)
    new.original_class = kind
    return new


@PickledName
def _restore_module(name: str, kind: type[nn.Module]) -> PrunedModule:
    return _blank(name, kind)


@PickledName
def _restore_pass_through() -> PassThrough:
    return PassThrough.__new__(PassThrough)


def _copy_registry(value: Any) -> Any:
    """Copy the dictionaries and sets in which a module keeps its parts, hooks and tensors."""
    return value.copy() if isinstance(value, (dict, set)) else value


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the public attributes of a module that hold no tensors, modules or methods of it.

    Code around a removed block may read them, as ultralytics reads the indices of the inputs of each layer. Settings of
    a layer of torch (``__constants__``, such as `inplace`) are left out.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> layer.f = -1
    >>> plain_attributes(layer)
    {'f': -1}
    """
    left_out = {*_MODULE_STATE, *getattr(module, "__constants__", ()), "inplace"}
    values = {key: value for key, value in vars(module).items() if key not in left_out and not key.startswith("_")}
    unfit = (torch.Tensor, nn.Module, MethodType)
    return {key: value for key, value in values.items() if not isinstance(value, unfit) and not _holds_modules(value)}


def _holds_modules(value: Any) -> bool:
    """Whether an attribute is a list of modules. Some of them may be gone, and no one can tell which."""
    return isinstance(value, (list, tuple)) and any(isinstance(item, nn.Module) for item in value)


def _rebind(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """Bind a method of one module to another."""
    if not isinstance(value, MethodType) or value.__self__ is not old:
        return value
    return MethodType(value.__func__, new)


_OWN = frozenset({"forward", "__init__", "__new__", "__call__", "__getattr__", "__setattr__", "__delattr__", "__dir__"})
_CONTAINER = frozenset({"__len__", "__iter__", "__getitem__", "__contains__"})


def _adopt_overrides(cls: type, kind: type) -> None:
    """Give a class the functions by which another class overrides those of `torch.nn.Module`, and its length and index.

    `super()` in them calls the function of `torch.nn.Module`.
    """
    if issubclass(kind, fx.GraphModule):
        return
    for base in reversed(kind.__mro__[: kind.__mro__.index(nn.Module)]):
        for name, function in vars(base).items():
            overrides = hasattr(nn.Module, name) and not hasattr(object, name) and name not in _OWN
            if isinstance(function, FunctionType) and (overrides or name in _CONTAINER):
                setattr(cls, name, _with_class(function, cls))


def _with_class(function: FunctionType, cls: type) -> FunctionType:
    """Copy a function for another class: `super()` looks there."""
    names = function.__code__.co_freevars
    cells = tuple(
        CellType(cls) if name == "__class__" else cell
        for name, cell in zip(names, function.__closure__ or (), strict=True)
    )
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__, new.__doc__ = function.__kwdefaults__, function.__doc__
    return new


def _names_in(attribute: Any) -> set[str]:
    """Return the attribute names that the code of a function, a property or a class method reads."""
    functions = [attribute, *(getattr(attribute, name, None) for name in ("fget", "__func__", "__wrapped__"))]
    codes = [code for code in (getattr(function, "__code__", None) for function in functions) if code is not None]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def called_layers(gm: fx.GraphModule) -> list[str]:
    """Return the path of the module in each module call of a graph."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]


Row = tuple[str, str, Any, Any, Any, Any]


class _Reference:
    """Stands for a node in a row."""

    def __init__(self, name: str) -> None:
        self.name = name


def graph_to_rows(graph: fx.Graph) -> Iterator[Row]:
    """Yield operation, name, target, args, kwargs and type of each node, as values that can be pickled.

    Examples
    --------
    >>> rows = list(graph_to_rows(fx.symbolic_trace(nn.ReLU()).graph))
    >>> rows[1][:3], len(rows_to_graph(rows).nodes)
    (('call_function', 'relu', ('torch.nn.functional', 'relu')), 3)
    """
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else _name_function(node.target)
        args, kwargs = (_map_nodes(value, lambda node: _Reference(node.name)) for value in (node.args, node.kwargs))
        yield node.op, node.name, target, args, kwargs, node.type


def rows_to_graph(rows: Collection[Row]) -> fx.Graph:
    """Build a graph from the output of `graph_to_rows`."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for op, name, target, args, kwargs, kind in rows:
        target = _find_function(target) if op == "call_function" else target
        args, kwargs = (_map_references(value, nodes) for value in (args, kwargs))
        nodes[name] = graph.create_node(op, target, args, kwargs, name, kind)
    return graph


_OPERATORS = (type(torch.ops.aten.relu), type(torch.ops.aten.relu.default))


def _name_function(function: Callable[..., Any]) -> Any:
    """Return module and name of a function that can be found by them; otherwise the function."""
    named = (str(getattr(function, "__module__", None) or "torch"), str(getattr(function, "__name__", "")))
    if isinstance(function, _OPERATORS):
        return ("torch.ops", str(function))
    try:
        return named if _find_function(named) is function else function
    except (ImportError, AttributeError):
        return function


def _find_function(named: Any) -> Callable[..., Any]:
    if not isinstance(named, tuple):
        return named  # type: ignore[no-any-return]
    module, name = named
    value: Any = torch.ops if module == "torch.ops" else importlib.import_module(module)
    for atom in name.split("."):
        value = getattr(value, atom)
    return value  # type: ignore[no-any-return]


def _map_nodes(value: Any, change: Callable[[fx.Node], Any]) -> Any:
    return _map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, fx.Node) else leaf)


def _map_references(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    return _map_leaves(value, lambda leaf: nodes[leaf.name] if isinstance(leaf, _Reference) else leaf)


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested tuples, lists, dictionaries and slices."""
    if isinstance(value, (tuple, list)):
        return (tuple if isinstance(value, tuple) else list)(_map_leaves(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_map_leaves(item, change) for item in (value.start, value.stop, value.step)))
    return change(value)
