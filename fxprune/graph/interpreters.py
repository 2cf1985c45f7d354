"""Runs captured graphs by fx interpreters, node by node, inside a model that is not changed for this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fxprune.graph.operators import in_place_layers
from fxprune.graph.records import Island
from fxprune.graph.symbolic_shapes import bind_placeholders


@dataclass(frozen=True)
class Graphs:
    """The graphs of a model's islands. Iterating over them yields pairs of island name and graph.

    Attributes
    ----------
    model : Module
        The model. It keeps its own modules, which share their layers with the graphs.
    pairs : tuple of (str, GraphModule)
        Island names and graphs.

    Examples
    --------
    >>> layer = nn.Sequential(nn.Linear(2, 2))
    >>> [name for name, gm in Graphs(layer, (("", fx.symbolic_trace(layer)),))]
    ['']
    """

    model: nn.Module
    pairs: tuple[tuple[str, fx.GraphModule], ...]

    @classmethod
    def of(cls, model: nn.Module, islands: Iterable[Island]) -> Graphs:
        """Take the graphs of a model's islands."""
        return cls(model, tuple((island.name, island.gm) for island in islands))

    def __iter__(self) -> Iterator[tuple[str, fx.GraphModule]]:
        return iter(self.pairs)


@contextmanager
def run_with(
    graphs: Graphs, make: Callable[[str, fx.GraphModule], fx.Interpreter], in_place: bool = False
) -> Iterator[None]:
    """Run the given graphs by interpreters until the end of the block. Compiled parts of the model run eagerly.

    Parameters
    ----------
    graphs : Graphs
        When the model calls the module of an island, the interpreter of its graph runs instead of its forward.
    make : callable
        ``(island, gm) -> Interpreter``; called once per graph.
    in_place : bool
        Whether layers that a graph calls may overwrite values that have no other reader. If False, they overwrite
        nothing. Outside of graphs, the layers keep their `inplace` flags.

    Examples
    --------
    >>> with run_with(captured.graphs, lambda island, gm: fx.Interpreter(gm)):       # doctest: +SKIP
    ...     captured.adapted.module(images)
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, gm in graphs:
            forward = _make_forward(gm, make(name, gm), in_place)
            stack.enter_context(_replaced_forward(graphs.model.get_submodule(name), forward))
        yield


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of one module, not of its class, until the end of the block."""
    own = vars(module)
    before = {"forward": own["forward"]} if "forward" in own else {}
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        own.update(before)


def _make_forward(gm: fx.GraphModule, interpreter: fx.Interpreter, in_place: bool) -> Callable[..., Any]:
    interpreter.extra_traceback = False
    fetch = partial(type(interpreter).fetch_args_kwargs_from_env, interpreter)
    interpreter.fetch_args_kwargs_from_env = lambda node: _plain(fetch(node))  # type: ignore[method-assign, assignment]
    layers = list(in_place_layers(gm))

    def forward(*args: Any, **kwargs: Any) -> Any:
        gradients = torch.is_grad_enabled() or (_keep_gradients.get() and not torch.is_inference_mode_enabled())
        with torch.set_grad_enabled(gradients), restricted_layers(layers, in_place):
            return interpreter.run(*bind_placeholders(gm, args, kwargs))

    return forward


_keep_gradients: ContextVar[bool] = ContextVar("keep_gradients", default=False)


@contextmanager
def gradients_in_graphs() -> Iterator[None]:
    """Run graphs with gradients in the block, also those that the model calls under `torch.no_grad`.

    The loss changes with the outputs of a frozen backbone as with those of any other, and its blocks have scores.

    Examples
    --------
    >>> with run_with(graphs, make), gradients_in_graphs():        # doctest: +SKIP
    ...     loss(model, batch).backward()
    """
    token = _keep_gradients.set(True)
    try:
        yield
    finally:
        _keep_gradients.reset(token)


def _plain(value: Any) -> Any:
    """Return the arguments of a node with lists and dicts as the program has them, not fx's immutable ones."""
    if type(value) is tuple:
        return tuple(map(_plain, value))
    if isinstance(value, immutable_list):
        return list(map(_plain, value))
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, immutable_dict) else value


@contextmanager
def restricted_layers(layers: Iterable[tuple[str, nn.Module, bool]], in_place: bool) -> Iterator[None]:
    """Restrict what the layers of a graph may overwrite, and restore their `inplace` flags at the end of the block.

    Graphs are functional: a layer that overwrites its input would change a value that is recorded, or that has readers
    later in the graph.

    Parameters
    ----------
    layers
        The output of `in_place_layers` for the graph.
    in_place : bool
        Whether layers keep their flag if the overwritten value has no other reader.
    """
    before: dict[nn.Module, Any] = {}
    try:
        for _, layer, harmless in layers:
            before.setdefault(layer, layer.inplace)
            layer.inplace = bool(layer.inplace) and harmless and in_place  # type: ignore[assignment]
        yield
    finally:
        for layer, flag in before.items():
            layer.inplace = flag


NodeName = tuple[str, str]
"""Path of the island and name of the node. Together they identify a node in the whole model."""
