"""Times single nodes: an interpreter runs the graphs and records when each node begins and ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxprune.graph.interpreters import Graphs, NodeName, run_with
from fxprune.graph.operators import in_place_functions
from fxprune.profiling.interleaved_timing import stopwatch


@dataclass
class NodeTimes:
    """Milliseconds of one run under the interpreter.

    Attributes
    ----------
    nodes_ms : dict
        Time of each node, summed over its calls.
    outermost_ms : float
        Time of all nodes, without nodes inside a node of another graph.
    graphs_ms : float
        Time of the outermost graphs, including the work of the interpreter itself.
    """

    nodes_ms: dict[NodeName, float] = field(default_factory=lambda: defaultdict(float))
    outermost_ms: float = 0.0
    graphs_ms: float = 0.0

    def share(self, nodes: Iterable[NodeName]) -> float:
        """Return the share of some nodes in the time of all nodes."""
        own = sum(self.nodes_ms.get(node, 0.0) for node in nodes)
        return own / self.outermost_ms if self.outermost_ms else 0.0


class NodeTimer:
    """Runs a model with its graphs and records when each node and each graph begins and ends.

    Attributes
    ----------
    runs : list of list
        Records of every run: island, node name (None for a whole graph), depth, begin and end.

    Examples
    --------
    >>> timer = NodeTimer(graphs, device, time.perf_counter)       # doctest: +SKIP
    >>> timer.run(lambda: model(images))                           # doctest: +SKIP
    >>> timer.times()[0].nodes_ms                                  # doctest: +SKIP
    """

    def __init__(self, graphs: Graphs, device: torch.device | None, clock: Callable[[], float]) -> None:
        self.now, self.elapsed_ms = stopwatch(device, clock)
        self.graphs = graphs
        self.interpreters = {name: _TimingInterpreter(gm, name, self) for name, gm in graphs}
        self.depth = 0
        self.runs: list[list[tuple[str, str | None, int, Any, Any]]] = []

    def run(self, call: Callable[[], Any]) -> None:
        """Run the model once."""
        self.runs.append([])
        with run_with(self.graphs, lambda name, gm: self.interpreters[name], in_place=True):
            call()

    def record(self, island: str, node: str | None, begin: Any) -> None:
        """Record that a node or, if `node` is None, a graph ends now."""
        self.runs[-1].append((island, node, self.depth, begin, self.now()))

    def times(self) -> list[NodeTimes]:
        """Sum up the records of every run."""
        found = []
        for run in self.runs:
            found.append(times := NodeTimes())
            for island, node, depth, begin, end in run:
                milliseconds = self.elapsed_ms(begin, end)
                if node is not None:
                    times.nodes_ms[island, node] += milliseconds
                    times.outermost_ms += milliseconds if depth == 1 else 0.0
                elif depth == 0:
                    times.graphs_ms += milliseconds
        return found


class _TimingInterpreter(fx.Interpreter):
    """Times the calls without the look-up of arguments, because only an interpreter looks them up.

    Functions and layers run in place where those of the program do, unless the overwritten value has another reader.
    """

    def __init__(self, gm: fx.GraphModule, island: str, timer: NodeTimer) -> None:
        super().__init__(gm)
        self.island, self.timer, self.current = island, timer, ""
        self.inplace_functions = {node.name: written for node, written in in_place_functions(gm)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        begin = self.timer.now()
        self.timer.depth += 1
        try:
            return super().run(*args, **kwargs)
        finally:
            self.timer.depth -= 1
            self.timer.record(self.island, None, begin)

    def run_node(self, n: fx.Node) -> Any:
        self.current = n.name
        return super().run_node(n)

    def call_module(self, *args: Any) -> Any:
        return self._run_timed(super().call_module, args)

    def call_function(self, target: Any, *args: Any) -> Any:
        return self._run_timed(super().call_function, (self.inplace_functions.get(self.current, target), *args))

    def call_method(self, *args: Any) -> Any:
        return self._run_timed(super().call_method, args)

    def _run_timed(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        node, begin = self.current, self.timer.now()
        value = run(*args)
        self.timer.record(self.island, node, begin)
        return value
