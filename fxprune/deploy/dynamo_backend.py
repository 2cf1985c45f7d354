"""A `torch.compile` backend that carries a plan out on Dynamo's graphs and hands them to another backend."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.eval_frame import OptimizedModule

from fxprune.adapters.registry import unwrap
from fxprune.deploy.dynamo_matching import DynamoGraph, RegionMatches, find_occurrences
from fxprune.errors import FxpruneWarning, ModelError, PlanError, SettingError
from fxprune.passes.bypass import bypass_regions
from fxprune.passes.dead_code import erase_unused
from fxprune.passes.in_place import functionalize
from fxprune.planning.plan import Plan
from fxprune.rewriting.apply import trace_checked

OPTION_NAMES = ("plan", "inner", "inner_options")


@dataclass(frozen=True, eq=False)
class Session:
    """What one compiled model is pruned by; lives as long as the model."""

    plan: Plan
    matches: RegionMatches
    paths: Mapping[int, str]
    file_stamp: tuple[str, int, int] | None
    finalizer: weakref.finalize[[], nn.Module]


_SESSIONS: weakref.WeakKeyDictionary[nn.Module, dict[str, Session]] = weakref.WeakKeyDictionary()


def fxprune_backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Prune one of Dynamo's graphs by a plan and compile it with another backend.

    Torch finds it by name, no import is needed; what the plan removes is gone before the inner backend sees the graph.

    Parameters
    ----------
    gm : GraphModule
        Dynamo's graph; parameters are placeholders.
    example_inputs : sequence
        Of the graph.
    options : dict
        ``plan``: a `Plan` or the path of a plan file, made for the model that is compiled. ``inner``: name of the
        backend that compiles what is left, or a callable ``(gm, example_inputs)``; by default ``"inductor"``.
        ``inner_options``: a dict, handed on as that backend's ``options``.
    mode : str, optional
        ``torch.compile``'s own; handed on to inductor.

    Returns
    -------
    callable
        The compiled graph.

    Raises
    ------
    SettingError
        If an option is missing or unknown.
    PlanError
        If the plan was made for another model, a graph break cuts one of its regions, or (when the compiled model is
        called a second time) one of them was met in no graph; names the region.
    ModelError
        If it is not a module that is compiled.

    Warns
    -----
    FxpruneWarning
        If a region was met in no graph and the compiled model was never called again.

    Examples
    --------
    >>> compiled = torch.compile(model, backend="fxprune", options={"plan": "plan.json"})     # doctest: +SKIP
    """
    options = check_options(kwargs.pop("options", None))
    session = _get_session(_compiled_module(sys._getframe()), options)
    try:
        bypasses = session.matches.find_bypasses(DynamoGraph(gm, session.paths))
    except PlanError:
        session.finalizer.detach()  # it is said already
        raise
    if bypasses:
        inside = {node for found in bypasses for node in found.nodes}
        functionalize(gm, inside | {found.stand_in for found in bypasses})
        bypass_regions(gm, {found.exit: found.stand_in for found in bypasses})
        erase_unused(gm, inside)
    return _refuse_changed_plan(_inner_compiler(options, kwargs)(gm, example_inputs), session)


def check_options(options: Any) -> dict[str, Any]:
    """Fill in the defaults of the backend's options.

    Raises
    ------
    SettingError
        If there is no plan, a key is unknown, or a value has the wrong kind.
    """
    if not isinstance(options, Mapping) or "plan" not in options:
        raise SettingError('the backend "fxprune" needs a plan: torch.compile(..., options={"plan": plan_or_path})')
    unknown = sorted(set(options) - set(OPTION_NAMES))
    if unknown:
        raise SettingError(f'the backend "fxprune" has no option {unknown[0]!r}; it has {", ".join(OPTION_NAMES)}')
    plan = options["plan"]
    if not isinstance(plan, (Plan, str, os.PathLike)):
        raise SettingError(f"option 'plan' is a {type(plan).__name__}; give a Plan or the path of a plan file")
    inner = options.get("inner", "inductor")
    if inner == "fxprune" or not (isinstance(inner, str) or callable(inner)):
        raise SettingError(f"option 'inner' is {inner!r}; give another backend's name, or a callable")
    return {"plan": plan, "inner": inner, "inner_options": dict(options.get("inner_options") or {})}


def _inner_compiler(options: Mapping[str, Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The backend that compiles what is left, with its options filled in."""
    inner, settings = options["inner"], options["inner_options"]
    compile_: Callable[..., Any] = lookup_backend(inner) if isinstance(inner, str) else inner
    if inner == "inductor":
        from torch._inductor import list_mode_options

        mode = kwargs.pop("mode", None)
        patches = {**(list_mode_options(mode) if mode else {}), **settings}
        return lambda gm, inputs: compile_(gm, inputs, config_patches=patches)
    if settings:
        kwargs["options"] = settings
    return lambda gm, inputs: compile_(gm, inputs, **kwargs)


def _get_session(compiled: nn.Module, options: Mapping[str, Any]) -> Session:
    """The session of a compiled module and a plan; made when its first graph comes."""
    given = options["plan"]
    stamp = None if isinstance(given, Plan) else _file_stamp(given)
    sessions = _SESSIONS.setdefault(compiled, {})
    key = repr(stamp) if stamp else str(id(given))
    if key not in sessions:
        plan = given if isinstance(given, Plan) else Plan.load(given)
        network = unwrap(compiled._orig_mod if isinstance(compiled, OptimizedModule) else compiled)
        gms = {island.name: trace_checked(network, island, plan) for island in plan.islands}
        places = {name: find_occurrences(name, gm) for name, gm in gms.items()}
        paths = {id(module): name for name, module in network.named_modules()}
        search = RegionMatches(plan.removed, places)
        sessions[key] = Session(plan, search, paths, stamp, _report_unmatched(compiled, search))
    return sessions[key]


def _file_stamp(path: Any) -> tuple[str, int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise PlanError(f"the plan file {os.fspath(path)!r} cannot be read: {error.strerror}") from None
    return str(Path(path).resolve()), found.st_mtime_ns, found.st_size


def _compiled_module(frame: FrameType | None) -> nn.Module:
    """What was called: an ``OptimizedModule``, or a module compiled in place by ``module.compile()``.

    Raises
    ------
    ModelError
        If there is none: a function was compiled.
    """
    found = None
    while frame is not None:
        own = frame.f_locals.get("self")
        in_place = isinstance(own, nn.Module) and getattr(own, "_compiled_call_impl", None) is not None
        if isinstance(own, OptimizedModule) or in_place:
            found = own
        frame = frame.f_back
    if not isinstance(found, nn.Module):
        raise ModelError('backend="fxprune" compiles modules: call torch.compile(model, ...), not on a function')
    return found


def _report_unmatched(compiled: nn.Module, search: RegionMatches) -> weakref.finalize[[], nn.Module]:
    """Complain of regions that were met nowhere, when the module is called again or goes away.

    Returns
    -------
    finalize
        What complains when it goes away.
    """

    def complaint() -> str:
        names = ", ".join(map(repr, search.unmatched))
        return (
            f"{len(search.unmatched)} of the plan's regions were met in no graph and are not pruned: {names}."
            " Graph breaks hide them, or their code was not compiled; prune with fxprune.apply and compile that"
        )

    def check() -> None:
        last.detach()
        if search.unmatched:
            raise PlanError(complaint())

    def at_the_end() -> None:
        if search.unmatched:
            warnings.warn(complaint(), FxpruneWarning, stacklevel=2)

    last = weakref.finalize(compiled, at_the_end)
    _before_next_call(compiled, check)
    return last


def _before_next_call(compiled: nn.Module, check: Callable[[], None]) -> None:
    """Run `check` once, outside of what Dynamo sees, when a module that is being called is called again."""
    if isinstance(compiled, OptimizedModule):

        def hook(*_: Any) -> None:
            check()
            handle.remove()

        handle = compiled.register_forward_pre_hook(hook)
        return
    run: Callable[..., Any] = compiled._compiled_call_impl  # type: ignore[assignment]

    def checked(*args: Any, **kwargs: Any) -> Any:
        check()
        compiled._compiled_call_impl = run
        return run(*args, **kwargs)

    compiled._compiled_call_impl = checked


def _refuse_changed_plan(compiled: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """Refuse to run code that was compiled for a plan file that has changed since; one that is gone changes nothing."""
    if session.file_stamp is None:
        return compiled
    stamp = session.file_stamp

    def run(*args: Any) -> Any:
        if os.path.exists(stamp[0]) and _file_stamp(stamp[0]) != stamp:
            raise PlanError(f"the plan file {stamp[0]!r} changed after it was compiled; call torch._dynamo.reset()")
        return compiled(*args)

    return run
