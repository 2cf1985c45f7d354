"""What fxprune reads off an fx graph: the value graph, parameters of a node, names, fingerprints."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

SOURCE, SINK = "<source>", "<sink>"
TRACED_MODULES = "fxprune_called"
"""Key of a captured graph's meta: paths of the modules that were traced into."""
INPLACE_ORIGIN = "fxprune_written"
"""Key of a node's meta: the in-place function that the program calls there."""


def qualified_name(target: Any) -> str:
    """Name a call target the same way in every process, e.g. ``torch.nn.functional.relu``."""
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", None) or type(target).__name__
    return f"{getattr(target, '__module__', None) or 'torch'}.{name}"


def operation_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """Name what a node does as a reader would: ``Conv2d``, ``relu``, ``add``, ``input``."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input"}.get(node.op, node.op)
    return qualified_name(node.target).rpartition(".")[2]


def class_names(module: nn.Module) -> list[str]:
    """Qualified names of a module's class and of all it derives from, nearest first."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def value_graph(graph: fx.Graph) -> nx.DiGraph:
    """Build the directed graph of values that flow through an fx graph.

    Constants (`get_attr`) are left out: they are no data and would tie unrelated nodes together. `SOURCE` precedes
    every value that needs no other one, `SINK` follows whatever the output reads and whatever has an effect.

    Returns
    -------
    networkx.DiGraph
        Nodes are node names, in graph order; values that reach neither output nor effect are left out.
    """
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_node(SOURCE)
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        inputs = [source.name for source in node.all_input_nodes if source.op != "get_attr"]
        name = SINK if node.op == "output" else node.name
        flow.add_edges_from((source, name) for source in inputs or [SOURCE])
        if node.op not in ("output", "placeholder") and has_effect(node):
            flow.add_edge(node.name, SINK)
    flow.add_node(SINK)
    alive = nx.ancestors(flow, SINK) | {SOURCE, SINK}
    return flow.subgraph(alive).copy()


def has_effect(node: fx.Node) -> bool:
    """Whether a node must run although nobody reads its value. Assertions need not: they guard what is removed."""
    return node.target is not torch._assert and node.is_impure(impure_random=False)


def node_parameters(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and value of every parameter a node reads, by module call or as a constant argument."""
    if node.op == "call_module":
        prefix = str(node.target)
        for name, parameter in gm.get_submodule(prefix).named_parameters():
            yield f"{prefix}.{name}", parameter
        return
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            value = get_attribute(gm, str(source.target))
            if isinstance(value, nn.Parameter):
                yield str(source.target), value


def get_attribute(gm: nn.Module, path: str) -> Any:
    """Follow a dotted path of attributes, as a `get_attr` node does."""
    value: Any = gm
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def is_weighted(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node does the work a region is removed for: it reads a parameter with two dimensions or more.

    Scales and shifts (norms, layer scale) have one dimension longer than 1 and do not count.
    """
    return any(sum(size > 1 for size in parameter.shape) >= 2 for _, parameter in node_parameters(gm, node))


def tied_tensors(model: nn.Module) -> set[int]:
    """Which parameters and buffers of a model lie under more than one name, by `id`."""
    names = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    names += Counter(id(value) for _, value in model.named_buffers(remove_duplicate=False))
    return {key for key, count in names.items() if count > 1}


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Apply `change` to every tensor of nested containers and keep their structure."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, change, tree)


def graph_structure(graph: fx.Graph) -> list[tuple[str, str, str, str]]:
    """One row a node: operation, target, arguments by position in the graph. Equal for graphs that do the same."""
    index = {node: f"%{position}" for position, node in enumerate(graph.nodes)}
    return [
        (node.op, qualified_name(node.target), _format_argument(node.args, index), _format_argument(node.kwargs, index))
        for node in graph.nodes
    ]


def _format_argument(value: Any, index: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return index[value]
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_format_argument(item, index) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_format_argument(item, index)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice{_format_argument((value.start, value.stop, value.step), index)}"
    return qualified_name(value) if callable(value) else repr(value)


def fingerprint(gm: fx.GraphModule) -> str:
    """Digest of what a graph does: its nodes, the classes of the layers they call, the shapes of their weights.

    Two graphs with one fingerprint have the same nodes under the same names, so a plan made for one fits the other.

    Returns
    -------
    str
        16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for node, row in zip(gm.graph.nodes, graph_structure(gm.graph), strict=True):
        called = gm.get_submodule(str(node.target)).modules() if node.op == "call_module" else ()
        classes = [type(module).__name__ for module in called]
        shapes = [f"{name}{tuple(parameter.shape)}" for name, parameter in node_parameters(gm, node)]
        digest.update("|".join((node.name, *row, *classes, *shapes)).encode() + b"\n")
    return digest.hexdigest()[:16]


def join_path(*parts: str) -> str:
    """Join module paths with dots and leave empty ones out: ``join_path("", "conv") == "conv"``."""
    return ".".join(part for part in parts if part)


def is_within(path: str, outer: str | Iterable[str]) -> bool:
    """Whether a dotted path is another one, or one of some others, or lies below it; everything lies below "".

    Examples
    --------
    >>> is_within("layer1.0.conv", "layer1"), is_within("layer10", ["layer1", "layer2"])
    (True, False)
    """
    outers = [outer] if isinstance(outer, str) else outer
    return any(not other or f"{path}.".startswith(f"{other}.") for other in outers)


def common_name(inside: Iterable[str], outside: Iterable[str], called: Iterable[str] = ()) -> str:
    """Shortest dotted path that holds all of `inside` and none of `outside`; first..last where there is none.

    Paths among `called` come first: a list of modules is never called, its only block is.

    Examples
    --------
    >>> common_name(["layer3.4.conv1", "layer3.4.conv2"], ["layer3.3.conv1"])
    'layer3.4'
    >>> common_name(["b.conv1", "b.conv2"], ["b.down"])
    'b.conv1..conv2'
    >>> common_name(["m.0.cv1", "m.0.cv2"], ["cv1"], called=["m.0", "m.0.cv1"])
    'm.0'
    """
    inside, outside = list(inside), list(outside)
    atoms = inside[0].split(".")
    prefixes = [".".join(atoms[:length]) for length in range(1, len(atoms) + 1)]
    fitting = [
        prefix
        for prefix in prefixes
        if all(is_within(name, prefix) for name in inside) and not any(is_within(name, prefix) for name in outside)
    ]
    if fitting:
        known = set(called)
        return next((prefix for prefix in fitting if prefix in known), fitting[0])
    first, last = inside[0].split("."), inside[-1].split(".")
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(last))
    return inside[0] if len(inside) == 1 else f"{inside[0]}..{'.'.join(last[shared:])}"
