"""Reads facts from an fx graph: the value graph, the parameters of a node, names, fingerprints."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from fxprune.runtime.torch_internals import ASSERTION, tree_map_only

SOURCE, SINK = "<source>", "<sink>"
TRACED_MODULES = "fxprune_called"
"""Key of a captured graph's meta: paths of the modules that were traced into."""
CONSTANT_ARGUMENTS = "fxprune_constants"
"""Key of a captured graph's meta: values of the arguments that the graph takes and does not read."""
INPLACE_ORIGIN = "fxprune_written"
"""Key of a node's meta: the in-place function that the traced program calls there."""
OVERWRITES = "fxprune_overwrites"
"""Key of a node's meta: whether the traced program overwrites the node's first input there."""


def qualified_name(target: Any) -> str:
    """Name a call target the same way in every process, e.g. ``torch.nn.functional.relu``."""
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", None) or type(target).__name__
    return f"{getattr(target, '__module__', None) or 'torch'}.{name}"


def operation_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """Return the short name of a node's operation, for display: ``Conv2d``, ``relu``, ``add``, ``input``."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input"}.get(node.op, node.op)
    return qualified_name(node.target).rpartition(".")[2]


def class_names(module: nn.Module) -> list[str]:
    """Return the qualified names of a module's class and of its base classes, in method resolution order."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def value_graph(graph: fx.Graph) -> nx.DiGraph:
    """Build the directed graph of values that flow through an fx graph.

    Constants (see `is_constant_node`) are left out: they are not data and would connect unrelated nodes.
    `SOURCE` precedes every value without inputs. `SINK` follows the values that the output reads and the nodes that
    have an effect.

    Returns
    -------
    networkx.DiGraph
        Its nodes are node names, in graph order. Values that reach neither the output nor an effect are left out.

    Examples
    --------
    >>> list(value_graph(fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph).edges)
    [('<source>', 'input_1'), ('input_1', '_0'), ('_0', '<sink>')]
    """
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_node(SOURCE)
    for node in graph.nodes:
        if is_constant_node(node):
            continue
        inputs = [source.name for source in node.all_input_nodes if not is_constant_node(source)]
        name = SINK if node.op == "output" else node.name
        flow.add_edges_from((source, name) for source in inputs or [SOURCE])
        if node.op not in ("output", "placeholder") and has_effect(node):
            flow.add_edge(node.name, SINK)
    flow.add_node(SINK)
    alive = nx.ancestors(flow, SINK) | {SOURCE, SINK}
    return flow.subgraph(alive).copy()


def is_constant_node(node: fx.Node) -> bool:
    """Whether a node's value depends on no input of the graph: a `get_attr`, or a function of such values only.

    Examples
    --------
    >>> class Shifted(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.shift = nn.Parameter(torch.ones(2))
    ...     def forward(self, x):
    ...         return x + self.shift.reshape(2, 1)
    >>> [is_constant_node(node) for node in fx.symbolic_trace(Shifted()).graph.nodes]
    [False, True, True, False, False]
    """
    return node.op != "output" and constant_sources(node) is not None


def constant_sources(
    node: fx.Node, is_source: Callable[[fx.Node], bool] = lambda node: node.op == "get_attr"
) -> list[fx.Node] | None:
    """Return the constants from which a node is computed, by functions alone; None if it depends on anything else."""
    waiting, seen = [node], dict[fx.Node, None]()
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen[found] = None
        inputs = [] if is_source(found) else found.all_input_nodes
        if not is_source(found) and (
            found.op not in ("call_function", "call_method") or not inputs or has_effect(found)
        ):
            return None
        waiting += inputs
    return [found for found in seen if is_source(found)]


def has_effect(node: fx.Node) -> bool:
    """Whether a node must run even if no node reads its value. Assertions need not: they check removed values."""
    return node.target is check_constant or (node.target is not ASSERTION and node.is_impure(impure_random=False))


def check_constant(value: Any, expected: Any, name: str) -> None:
    """Raise `TypeError` unless an argument has the value with which a module was traced.

    Examples
    --------
    >>> check_constant(None, None, "mask")
    """
    if isinstance(value, fx.Proxy):
        return  # whoever traces the module has no value to check
    if value is not expected and (isinstance(value, torch.Tensor) or value != expected):
        found = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(
            f"this pruned module was traced with {name}={expected!r} and got {found}; prune the model with calibration"
            f" calls that give {name}"
        )


def node_parameters(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the path and the value of every parameter that a node reads, by module call or as a constant argument.

    A parameter that a node reads through functions of constants counts as read by that node alone.
    """
    if not is_constant_node(node):
        yield from _direct_parameters(gm, node)
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                for constant in constant_sources(source) or ():
                    yield from _as_parameter(gm, constant)


def _direct_parameters(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, nn.Parameter]]:
    if node.op == "call_module":
        prefix = str(node.target)
        for name, parameter in gm.get_submodule(prefix).named_parameters():
            yield f"{prefix}.{name}", parameter
        return
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            yield from _as_parameter(gm, source)


def _as_parameter(gm: fx.GraphModule, constant: fx.Node) -> Iterator[tuple[str, nn.Parameter]]:
    value = get_attribute(gm, str(constant.target))
    if isinstance(value, nn.Parameter):
        yield str(constant.target), value


def get_attribute(gm: nn.Module, path: str) -> Any:
    """Return the attribute at a dotted path, as a `get_attr` node does."""
    value: Any = gm
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def is_weighted(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node reads a parameter with at least two dimensions longer than 1.

    Regions are removed to save the work of such nodes. Scales and shifts (norms, layer scale) have one dimension
    longer than 1 and do not count.
    """
    return any(sum(size > 1 for size in parameter.shape) >= 2 for _, parameter in node_parameters(gm, node))


def tied_tensors(model: nn.Module) -> set[int]:
    """Return the `id` of each parameter and buffer that a model holds under more than one name."""
    names = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    names += Counter(id(value) for _, value in model.named_buffers(remove_duplicate=False))
    return {key for key, count in names.items() if count > 1}


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Apply `change` to every tensor in nested containers and keep their structure."""
    return tree_map_only(torch.Tensor, change, tree)


def full_precision(value: torch.Tensor) -> torch.Tensor:
    """Return a value in half precision, as of layers under autocast, in float32: sums over it would be too coarse."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def graph_structure(graph: fx.Graph, exact_dtypes: bool = True) -> list[tuple[str, str, str, str]]:
    """Return one row per node: operation, target, args, kwargs. Nodes among the arguments appear as their positions.

    Graphs with the same operations have equal rows, whatever the names of their nodes. Unless `exact_dtypes`, all
    floating dtypes appear as one word.
    """
    words: dict[Any, str] = {node: f"%{position}" for position, node in enumerate(graph.nodes)}
    if not exact_dtypes:
        words |= dict.fromkeys(_FLOATING_DTYPES, "floating")
    return [
        (node.op, qualified_name(node.target), format_argument(node.args, words), format_argument(node.kwargs, words))
        for node in graph.nodes
    ]


_FLOATING_DTYPES = [
    value for value in vars(torch).values() if isinstance(value, torch.dtype) and value.is_floating_point
]


def format_argument(value: Any, words: Mapping[Any, str]) -> str:
    """Write an argument of a node; nodes and dtypes are looked up in `words`."""
    if isinstance(value, (fx.Node, torch.dtype)):
        return words.get(value, repr(value))
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(format_argument(item, words) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_argument(item, words)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice{format_argument((value.start, value.stop, value.step), words)}"
    return qualified_name(value) if callable(value) else repr(value)


def fingerprint(gm: fx.GraphModule) -> str:
    """Compute a digest of a graph: its nodes, the classes of the layers they call, the shapes of their weights.

    Two graphs with the same fingerprint have the same nodes under the same names, so a plan for one fits the other.
    Floating dtypes count as equal: a program may read the dtype of its weights, and a plan holds for all precisions.

    Returns
    -------
    str
        The first 16 hexadecimal digits of a SHA-256.

    Examples
    --------
    >>> first, second = (fx.symbolic_trace(nn.Sequential(nn.Linear(2, width))) for width in (3, 4))
    >>> fingerprint(first) == fingerprint(second)
    False
    """
    digest = hashlib.sha256()
    rows = graph_structure(gm.graph, exact_dtypes=False)
    for node, row in zip(gm.graph.nodes, rows, strict=True):
        called = gm.get_submodule(str(node.target)).modules() if node.op == "call_module" else ()
        classes = [type(module).__name__ for module in called]
        shapes = [f"{name}{tuple(parameter.shape)}" for name, parameter in _direct_parameters(gm, node)]
        digest.update("|".join((node.name, *row, *classes, *shapes)).encode() + b"\n")
    return digest.hexdigest()[:16]


def join_path(*parts: str) -> str:
    """Join module paths with dots and leave out empty ones: ``join_path("", "conv") == "conv"``."""
    return ".".join(part for part in parts if part)


def is_within(path: str, outer: str | Iterable[str]) -> bool:
    """Whether a dotted path equals or lies below `outer`, or one of several `outer` paths; "" contains every path.

    Examples
    --------
    >>> is_within("layer1.0.conv", "layer1"), is_within("layer10", ["layer1", "layer2"])
    (True, False)
    """
    outers = [outer] if isinstance(outer, str) else outer
    return any(not other or f"{path}.".startswith(f"{other}.") for other in outers)


def common_name(inside: Iterable[str], outside: Iterable[str], called: Iterable[str] = ()) -> str:
    """Return the shortest dotted path that contains all of `inside` and none of `outside`, else ``first..last``.

    Paths in `called` are preferred: a list of modules is never called, but the single block in it is.

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
