"""Captures islands: the largest submodules whose whole forward is one fx graph.

The model is not changed. A graph is trusted only if it agrees with its module in every run: in what it returns, in the
arguments and buffers that it overwrites, in the weights that gradients reach, and in its dtypes under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxprune.capture.module_trace import Traced, Untraced, constant_arguments, describe_exception, trace_module
from fxprune.capture.observed_runs import Call, RunRecord, Tell, Watch, equal, ignore_call, observe, reproducible
from fxprune.errors import LossError
from fxprune.graph.fx_utils import CONSTANT_ARGUMENTS, fingerprint, is_within, join_path
from fxprune.graph.interpreters import Graphs, run_with
from fxprune.graph.records import Island, RecordedCall, Rejection
from fxprune.graph.symbolic_shapes import TensorSpec, bind_placeholders, tensor_specs
from fxprune.runtime.private_copy import preserve_state
from fxprune.runtime.signals import defer_interrupts
from fxprune.runtime.torch_internals import (
    make_symbolic_tensor,
    shapes_only,
    symbolic_mode,
    tree_leaves,
    tree_map_only,
)

Run = Callable[[nn.Module], Any]
"""``(model) -> anything``: runs a model on one batch."""


def capture_islands(
    model: nn.Module, runs: Sequence[Run], whole_model_is_graph: bool
) -> tuple[list[Island], list[Rejection]]:
    """Find the islands of a model.

    Parameters
    ----------
    model : Module
        A private copy. It is run and traced, and left as it was.
    runs : sequence of callable
        ``(model) -> anything``: ways in which the model is called, the first with gradients. Each is called twice: with
        the model's own modules, and with all graphs in place. If the two differ, the modules whose graphs are to blame
        are refused, and the search continues with their children.
    whole_model_is_graph : bool
        Whether a graph may stand for the whole model.

    Returns
    -------
    islands : list of Island
        All islands. Outer islands come before those that are nested in their opaque parts.
    rejections : list of Rejection
        Modules that could not be captured as one graph, with the message of the exception or the difference. Their
        children may be islands.

    Raises
    ------
    LossError
        If the first run called no layer of the model.
    """
    comparison = _Comparison(model, runs)
    if not comparison.first_calls and any(True for _ in model.parameters()):
        raise LossError(f"the loss does not depend on the model: no layer of {type(model).__name__} was called")
    search = _Search(model, comparison.first_calls)
    islands = list(search.find("") if whole_model_is_graph else search.find_below(""))
    while islands and (blamed := comparison.find_unfaithful(islands)):
        search.refused |= blamed
        islands = [island for island in islands if not is_within(island.name, blamed)]
        islands += [found for name in blamed for found in search.find_below(name)]
    return [
        replace(island, overwritten=island.name in comparison.overwritten) for island in islands
    ], search.rejections()


class _Search:
    """The search for islands.

    Attributes
    ----------
    refused : dict of str to str
        Modules that were called and are not one graph, with the reasons, by path.
    """

    def __init__(self, model: nn.Module, calls: Mapping[str, RecordedCall]) -> None:
        self.model, self.calls = model, calls
        self.refused: dict[str, str] = {}

    def find(self, name: str) -> Iterator[Island]:
        """Yield the outermost traceable modules at or below a path, and those nested in their opaque parts."""
        if name in self.calls:
            module, call = self.model.get_submodule(name), self.calls[name]
            constants = constant_arguments(module, [(call.args, call.kwargs), *call.later])
            traced = constants if isinstance(constants, Untraced) else trace_module(module, (), constants=constants)
            if isinstance(traced, Traced) and not _dtypes_differ_under_autocast(module, traced.gm, call):
                opaque, print_ = tuple(sorted(traced.opaque)), fingerprint(traced.gm)
                yield Island(name, traced.gm, opaque, call, print_, traced.gm.meta[CONSTANT_ARGUMENTS])
                for path in sorted(traced.opaque):
                    part = join_path(name, path)
                    if part in self.calls:
                        self.refused[part] = traced.opaque[path]
                    yield from self.find_below(part)
                return
            autocast = "under torch.autocast, its graph returns other dtypes than the module"
            self.refused[name] = autocast if isinstance(traced, Traced) else traced.reason
        yield from self.find_below(name)

    def find_below(self, name: str) -> Iterator[Island]:
        """Yield the islands below a path, as `find` for each child."""
        for child, _ in self.model.get_submodule(name).named_children():
            yield from self.find(join_path(name, child))

    def rejections(self) -> list[Rejection]:
        """Return the refused modules. Containers that are never called are not listed."""
        return [
            Rejection(name or "<model>", f"it is not one graph, so only its parts can go: {reason}")
            for name, reason in self.refused.items()
            if reason
        ]


def _dtypes_differ_under_autocast(module: nn.Module, gm: fx.GraphModule, call: RecordedCall) -> bool:
    """Whether a graph returns other dtypes than its module under autocast. Only shapes and dtypes are computed.

    False if the module itself cannot be run in this way, or if the graph fails without autocast too: real runs tell.
    """
    specs = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, TensorSpec)]
    device, mode = specs[0].device.type if specs else "cpu", symbolic_mode()
    args, kwargs = tree_map_only(TensorSpec, lambda spec: _fake(mode, spec), (call.args, call.kwargs))
    interpreter = fx.Interpreter(gm)
    interpreter.extra_traceback = False

    def dtypes(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> list[torch.dtype] | None:
        try:
            leaves = tree_leaves(forward(*args, **kwargs))
        except Exception:  # code that looks at values fails here, with any error
            return None
        return [leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)]

    with defer_interrupts(), preserve_state(module), shapes_only(mode):
        inputs = bind_placeholders(gm, args, kwargs)
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            expected, found = dtypes(module.forward, *args, **kwargs), dtypes(interpreter.run, *inputs)
        failed_anyway = found is None and dtypes(interpreter.run, *inputs) is None
    return expected is not None and found != expected and not failed_anyway


def _fake(mode: Any, spec: TensorSpec) -> torch.Tensor:
    real = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
    return make_symbolic_tensor(mode, real, [False] * real.ndim)


class _Comparison:
    """Compares runs with graphs in place with runs of the model's own modules.

    Attributes
    ----------
    first_calls : dict of str to RecordedCall
        First call of each module that the first run calls, by path.
    overwritten : frozenset of str
        Islands whose output was overwritten outside them, in the last comparison.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Run]) -> None:
        self.model, self.runs, self.gradients, self.closely = model, runs, True, False
        self.first_calls: dict[str, RecordedCall] = {}
        self.overwritten: frozenset[str] = frozenset()
        names = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
        self.known = self._observe((), names, tell=self._keep_first_call)
        if self.known[0].failure is not None:  # a model may write to weights that require no gradient
            self.gradients = False
            self.known = self._observe((), names, tell=self._keep_first_call)
        for record in self.known:
            if record.failure is not None:
                raise record.failure

    def _keep_first_call(self, name: str, args: Any, kwargs: Any) -> None:
        given = (tensor_specs(args), tensor_specs(kwargs))
        if name in self.first_calls:
            self.first_calls[name].later.append(given)
        else:
            self.first_calls[name] = RecordedCall(*given)

    def _observe(self, islands: Sequence[Island], names: Sequence[str], tell: Tell = ignore_call) -> list[RunRecord]:
        """Run the model in every way, with the graphs of some islands in place. `tell` hears of the first run only."""
        with run_with(Graphs.of(self.model, islands), lambda name, gm: fx.Interpreter(gm)):
            first = Watch(tuple(names), self.gradients, self.closely, tell, outputs=bool(islands))
            later = Watch(tuple(names), closely=self.closely, outputs=bool(islands))
            watches = [first, *[later] * (len(self.runs) - 1)]
            return [observe(self.model, *pair) for pair in zip(self.runs, watches, strict=True)]

    def find_unfaithful(self, islands: Sequence[Island]) -> dict[str, str]:
        """Return the paths of islands whose graphs do not agree with their modules, each with the reason.

        As long as all agree, the model runs once in every way. After the first difference it is watched closely.
        """
        names = [island.name for island in islands]
        records = self._observe(islands, names)
        self.overwritten = frozenset().union(*(record.overwritten for record in records))
        if not self._differ(records, names):
            return {}
        self.closely = True
        self.known = [reproducible(*pair) for pair in zip(self.known, self._observe((), names), strict=True)]
        records = self._observe(islands, names)
        if not self._differ(records, names):
            return {}
        blamed: dict[str, str] = {}
        for known, seen in zip(self.known, records, strict=True):
            blamed = (_blame_calls(known, seen, names) or _blame_buffers(known, seen, names)) | blamed
        inner = {name: why for name, why in blamed.items() if not any(is_within(o, name) for o in blamed if o != name)}
        return inner or self._blame_alone(islands)

    def _differ(self, records: Sequence[RunRecord], names: Sequence[str]) -> bool:
        return any(_describe_difference(*pair, names) for pair in zip(self.known, records, strict=True))

    def _blame_alone(self, islands: Sequence[Island]) -> dict[str, str]:
        """Run the model with one graph at a time and return the islands with which its runs differ."""
        blamed: dict[str, str] = {}
        for island in islands:
            for pair in zip(self.known, self._observe([island], [island.name]), strict=True):
                if reason := _describe_difference(*pair, [island.name]):
                    blamed.setdefault(island.name, reason)
        return blamed or {islands[0].name: "the model gives other results with its graphs in place"}


def _calls_of(record: RunRecord, name: str, names: Sequence[str]) -> list[Call]:
    """Return the calls of an island, without those from inside of other islands, whose graphs contain its layers."""
    calls = record.calls.get(name, [])
    return [call for call in calls if all(o not in names or is_within(name, o) for o in call.within)]


def _describe_difference(known: RunRecord, seen: RunRecord, names: Sequence[str]) -> str:
    """Return in words how a run with the graphs of some islands differs from a run of the modules; "" if not."""
    if seen.failure is not None:
        return _describe_failure(seen.failure)
    for name in names:
        pair = _calls_of(known, name, names), _calls_of(seen, name, names)
        differing = [_describe_call(*calls) for calls in zip(*pair, strict=False)]
        if name in known.calls and (any(differing) or len(pair[0]) != len(pair[1])):
            return next(filter(None, differing), "with its graph in place, it is called another number of times")
    buffer = next((name for name, value in known.buffers.items() if not equal(value, seen.buffers.get(name))), None)
    if buffer is not None:
        return _describe_buffer(buffer)
    if not equal(known.reached, seen.reached):
        weight = min(known.reached ^ seen.reached)
        return f"gradients reach other weights through its graph than through the module, for example {weight!r}"
    return "" if equal(known.result, seen.result) else "the model gives another result with its graph in place"


def _describe_failure(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f"its graph fails on real values ({describe_exception(cause)})"


def _describe_buffer(name: str) -> str:
    return f"its forward writes to the buffer {name!r}, and its graph does not"


def _describe_call(known: Call, seen: Call) -> str:
    if not equal(known.output, seen.output):
        return "its graph returns other outputs than the module on the first calibration batch"
    if not equal(known.overwritten, seen.overwritten):
        return "its forward overwrites a tensor among its arguments, and its graph does not"
    return ""


def _blame_calls(known: RunRecord, seen: RunRecord, names: Sequence[str]) -> dict[str, str]:
    """Return the islands that got the inputs of their modules and did something else, with the difference in words."""
    blamed: dict[str, str] = {}
    for name in names:
        for pair in zip(_calls_of(known, name, names), _calls_of(seen, name, names), strict=False):
            if equal(pair[0].inputs, pair[1].inputs) and (reason := _describe_call(*pair)):
                blamed.setdefault(name, reason)
    for call in reversed(seen.begun if seen.failure is not None else []):
        earlier, expected = _calls_of(seen, call.name, names), _calls_of(known, call.name, names)
        if len(earlier) < len(expected) and equal(expected[len(earlier)].inputs, call.inputs):
            assert seen.failure is not None
            return blamed | {call.name: _describe_failure(seen.failure)}
    return blamed


def _blame_buffers(known: RunRecord, seen: RunRecord, names: Sequence[str]) -> dict[str, str]:
    """Return the innermost island around each buffer that has another value after the run."""
    blamed: dict[str, str] = {}
    for buffer, value in known.buffers.items():
        owners = [name for name in names if is_within(buffer, name)]
        if seen.failure is None and owners and not equal(value, seen.buffers.get(buffer)):
            blamed[max(owners, key=len)] = _describe_buffer(buffer)
    return blamed
