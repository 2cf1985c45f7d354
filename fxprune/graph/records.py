"""Defines the dataclasses that all stages share: islands, regions, rejections, and links between islands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True)
class RecordedCall:
    """Arguments of a module's first call on the observed batch, with a `TensorSpec` in place of each tensor.

    `later` has the arguments of the calls after the first.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    later: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False, default_factory=list)


@dataclass(frozen=True)
class Island:
    """A submodule that is captured as one graph.

    Attributes
    ----------
    name : str
        Dotted path in the model; "" is the model itself.
    gm : GraphModule
        The graph over the model's own layers. The model keeps the submodule; `run_with` runs the graph instead of it.
    opaque : tuple of str
        Paths below the island of modules that stay one node, because they cannot be traced.
    call : RecordedCall
        The first call of the submodule.
    fingerprint : str
        Fingerprint of the graph.
    constants : mapping of str to object
        Arguments that were the same constant in all calls, and are constants in the graph.
    overwritten : bool
        Whether code outside the submodule overwrites what it returns.
    """

    name: str
    gm: fx.GraphModule = field(repr=False)
    opaque: tuple[str, ...]
    call: RecordedCall = field(repr=False)
    fingerprint: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    overwritten: bool = False


@dataclass(frozen=True)
class Region:
    """A piece of an island's graph that can be removed.

    Attributes
    ----------
    name : str
        Dotted path in the model, e.g. ``backbone.body.layer3.4``: the shortest that contains its layers and no others.
    kind : str
        ``"bypass"``: readers of the exit read the entry instead. ``"drop"``: an addition omits one operand.
    island : str
        Path of the island; "" is the model itself.
    exit : str
        Node whose value is removed.
    stand_in : str
        Node whose value is read instead: the entry of a bypass, the remaining operand of a drop. Of a whole call that
        reads several values, it is the one that the result continues.
    nodes : tuple of str
        All removed nodes in graph order, including the exit.
    layers : tuple of str
        Dotted paths, in the model, of the modules with weights and of the constant weights that these nodes read.
    contiguous : bool
        Whether the stand-in is made contiguous: what reads the exit cannot work with its own memory layout.
    """

    name: str
    kind: str
    island: str
    exit: str
    stand_in: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    contiguous: bool = False


class Refusal(fx.proxy.TraceError):
    """A module must not be traced. The message is a predicate of its forward: ``"enters torch.no_grad"``."""


@dataclass(frozen=True)
class FoldedUnit:
    """Branches of a module that are folded into one layer after training, and so are removed together or not at all.

    Attributes
    ----------
    method : str
        Name of the module's method that folds them.
    parts : frozenset of str
        Paths, in the model, of the parameters that the fold replaces.
    """

    method: str
    parts: frozenset[str]


@dataclass(frozen=True)
class Rejection:
    """A layer or region that cannot be removed: its `name` and the `reason` in words."""

    name: str
    reason: str


IMAGES, RESULTS = "<images>", "<results>"
"""Ends of links: the input and the output of the model."""


@dataclass(frozen=True)
class Link:
    """Data flow from one island to another through Python code outside the graphs.

    Attributes
    ----------
    source : str
        Island that outputs the data, or `IMAGES`.
    target : str
        Island that reads the data, or `RESULTS`.
    """

    source: str
    target: str
