"""Backends for `torch.compile` that remove a plan's regions from Dynamo's graphs and pass them to another backend."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxprune.adapters.registry import unwrap
from fxprune.deploy.dynamo_matching import DynamoGraph, RegionMatches, find_occurrences
from fxprune.errors import FxpruneWarning, ModelError, PlanError, SettingError
from fxprune.passes.bypass import bypass_regions
from fxprune.passes.dead_code import erase_unused
from fxprune.passes.in_place import functionalize
from fxprune.planning.plan import Plan
from fxprune.rewriting.apply import trace_checked
from fxprune.runtime.torch_internals import (
    calling_module,
    compiled_call_count,
    compiled_frame,
    guard_identity,
    inner_compiler,
)

Inner = str | Callable[..., Any]
"""A backend that compiles pruned graphs: its name, or a callable ``(gm, example_inputs)``."""
NAME = "fxprune"
"""Name of the backend in its string form."""
OPTION_NAMES = ("plan", "inner", "inner_options")
"""Options of the backend in its string form."""


def pruning_backend(
    model: nn.Module, plan: Plan, inner: Inner = "inductor", inner_options: Mapping[str, Any] | None = None
) -> PruningBackend:
    """Make a backend for `torch.compile` that removes a plan's regions while the model is compiled.

    The model itself is not changed. The backend removes the regions from each graph that Dynamo captures and passes
    the rest to `inner`. It works for ``torch.compile(model, ...)``, for ``model.compile(...)`` and for functions that
    call the model. The backend does not keep the model alive.

    Parameters
    ----------
    model : Module
        The model that is compiled, before `torch.compile`.
    plan : Plan
        A plan for this model.
    inner : str or callable
        The backend that compiles the pruned graphs: its name, or a callable ``(gm, example_inputs)``.
    inner_options : mapping, optional
        Options of `inner`. For ``"inductor"``, these are the `options` of `torch.compile`.

    Returns
    -------
    PruningBackend
        A callable for the argument `backend` of `torch.compile`. A `mode` of `torch.compile` is passed to `inner`.

    Raises
    ------
    PlanError
        If the plan was made for another model. Also while the compiled model runs: if a graph break cuts a region, or
        if no graph contained it when the model is called a second time. The message names the region.
    ModelError
        If `model` is no module, or is compiled or wrapped already.
    SettingError
        If torch has no backend `inner`.

    Warns
    -----
    FxpruneWarning
        When the model is deleted or the process ends, if no graph contained a region and there was no second call.

    Examples
    --------
    >>> import fxprune
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 4, 1)).eval()
    >>> images = torch.rand(2, 3, 8, 8)
    >>> analysis = fxprune.analyze(model, [images], loss=lambda model, batch: model(batch).square().mean())
    >>> backend = fxprune.pruning_backend(model, analysis.plan(0.5), inner="eager")
    >>> compiled = torch.compile(model, backend=backend)
    >>> bool((compiled(images) == model[1](images)).all())
    True
    """
    return PruningBackend(model, plan, inner, inner_options)


class PruningBackend:
    """A backend for `torch.compile` that removes a plan's regions; made by `pruning_backend`.

    A copy of the compiled model gets a backend for the copy of the model. So does an unpickled one.

    Attributes
    ----------
    plan : Plan
        The plan.
    inner : str or callable
        The backend that compiles the pruned graphs.
    inner_options : dict
        Its options.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, inner: Inner = "inductor", inner_options: Mapping[str, Any] | None = None
    ) -> None:
        _check_inner(inner)
        if not isinstance(plan, Plan):
            raise PlanError(f"expected a Plan, got {type(plan).__name__}; read a file with Plan.load(path)")
        network = unwrap(model)
        self.__name__ = NAME  # torch names it in errors and logs
        self.plan, self.inner, self.inner_options = plan, inner, dict(inner_options or {})
        gms = {island.name: trace_checked(network, island, plan) for island in plan.islands}
        self._matches = RegionMatches(plan.removed, {name: find_occurrences(name, gm) for name, gm in gms.items()})
        self._model = weakref.ref(network)
        self._warning: weakref.finalize[[RegionMatches], nn.Module] | None = None

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Prune one of Dynamo's graphs and compile it; called by `torch.compile`.

        Parameters
        ----------
        gm : GraphModule
            The graph. Its parameters are inputs.
        example_inputs : sequence
            Fake inputs of the graph.
        mode : str, optional
            The `mode` of `torch.compile`.
        options : mapping, optional
            Not allowed: they are `inner_options` of `pruning_backend`.

        Returns
        -------
        callable
            The compiled graph.
        """
        if options:
            raise SettingError("give the options of the inner backend to pruning_backend, as inner_options")
        self._prune(gm)
        return self._check_later(inner_compiler(self.inner, self.inner_options, mode)(gm, example_inputs))

    def __reduce__(self) -> tuple[Any, ...]:
        return pruning_backend, (self._living_model(), self.plan, self.inner, self.inner_options)

    def reset(self) -> None:
        """Forget which regions were found; called by `torch.compiler.reset`, which deletes the compiled graphs."""
        self._matches.forget()
        self._cancel_warning()
        self._warning = None

    def _living_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ModelError("the model that was given to pruning_backend does not exist any more")
        return model

    def _prune(self, gm: fx.GraphModule) -> None:
        model, frame = self._living_model(), compiled_frame()
        if self._warning is None:
            self._warning = weakref.finalize(model, _warn_if_unmatched, self._matches)
        graph = DynamoGraph(gm, model, frame)
        try:
            bypasses = self._matches.find_bypasses(graph)
        except PlanError:
            self._cancel_warning()
            raise
        guard_identity(graph.submodules)
        if bypasses:
            inside = {node for found in bypasses for node in found.nodes}
            functionalize(gm, inside | {found.stand_in for found in bypasses})
            stand_ins = {found.exit: found.stand_in for found in bypasses}
            bypass_regions(gm, stand_ins, {found.exit for found in bypasses if found.contiguous})
            erase_unused(gm, inside)

    def _check_later(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Raise an error when a graph runs in a later call than the one it was compiled in and regions are missing."""
        if not self._matches.unmatched:
            return compiled
        first_call = compiled_call_count()

        def run(*args: Any) -> Any:
            if self._matches.unmatched and compiled_call_count() != first_call:
                self._cancel_warning()
                raise PlanError(_describe_unmatched(self._matches))
            return compiled(*args)

        return run

    def _cancel_warning(self) -> None:
        if self._warning is not None:
            self._warning.detach()


def _check_inner(inner: object) -> None:
    if inner == NAME or not (isinstance(inner, str) or callable(inner)):
        raise SettingError(f"'inner' is {inner!r}; give another backend's name, or a callable")
    if isinstance(inner, str) and inner not in torch.compiler.list_backends(()):
        raise SettingError(f"'inner' is {inner!r}, which is no backend; torch.compiler.list_backends() lists them")


def _warn_if_unmatched(matches: RegionMatches) -> None:
    if matches.unmatched:
        warnings.warn(_describe_unmatched(matches), FxpruneWarning, stacklevel=2)


def _describe_unmatched(matches: RegionMatches) -> str:
    names = ", ".join(map(repr, matches.unmatched))
    text = f"{len(matches.unmatched)} of the plan's regions were met in no graph and are not pruned: {names}."
    if not matches.model_found:
        return f"{text} No graph has modules of the model that the backend was made for; compile this model"
    return (
        f"{text} Graph breaks hide them, or their code was not compiled, for example above"
        " torch.compiler.config.recompile_limit; prune with fxprune.apply and compile that"
    )


# The string form -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NamedUse:
    """The backend of one model for one set of options; `stamp` is that of the plan file, or None."""

    options: Mapping[str, Any]
    stamp: tuple[str, int, int] | None
    backend: PruningBackend


_NAMED_USES: weakref.WeakKeyDictionary[nn.Module, list[_NamedUse]] = weakref.WeakKeyDictionary()


def fxprune_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Prune one of Dynamo's graphs by a plan and compile it; called by `torch.compile` for ``backend="fxprune"``.

    Torch finds this backend by its name without an import of fxprune. It compiles modules, not functions. For each
    model and set of options it makes a backend as `pruning_backend` does.

    Parameters
    ----------
    gm : GraphModule
        The graph. Its parameters are inputs.
    example_inputs : sequence
        Fake inputs of the graph.
    mode : str, optional
        The `mode` of `torch.compile`, which does not go with `options`.
    options : mapping
        ``plan``: a `Plan` for the model, or the path of a plan file. ``inner`` and ``inner_options``: as in
        `pruning_backend`.

    Returns
    -------
    callable
        The compiled graph.

    Raises
    ------
    SettingError
        If an option is missing, unknown or of the wrong type.
    PlanError
        As `pruning_backend`; also if the plan file cannot be read, or changes after the model was compiled.
    ModelError
        If a function is compiled.

    Warns
    -----
    FxpruneWarning
        As `pruning_backend`.

    Examples
    --------
    >>> compiled = torch.compile(model, backend="fxprune", options={"plan": "plan.json"})     # doctest: +SKIP
    """
    checked = check_options(options)
    model = calling_module()
    if model is None:
        raise ModelError(
            'backend="fxprune" compiles modules: call torch.compile(model, ...), not on a function, or give'
            " backend=fxprune.pruning_backend(model, plan)"
        )
    stamp = None if isinstance(checked["plan"], Plan) else _file_stamp(checked["plan"])
    backend = _named_backend(model, checked, stamp)
    return _refuse_changed_file(backend(gm, example_inputs, mode), stamp)


def check_options(options: Any) -> dict[str, Any]:
    """Check the options of the string form and fill in their defaults.

    Raises
    ------
    SettingError
        If there is no plan, a name is unknown, or the plan has the wrong type.
    """
    if not isinstance(options, Mapping) or "plan" not in options:
        raise SettingError('the backend "fxprune" needs a plan: torch.compile(..., options={"plan": plan_or_path})')
    unknown = sorted(set(options) - set(OPTION_NAMES))
    if unknown:
        raise SettingError(f'the backend "fxprune" has no option {unknown[0]!r}; it has {", ".join(OPTION_NAMES)}')
    plan = options["plan"]
    if not isinstance(plan, (Plan, str, os.PathLike)):
        raise SettingError(f"option 'plan' is a {type(plan).__name__}; give a Plan or the path of a plan file")
    inner_options = dict(options.get("inner_options") or {})
    return {"plan": plan, "inner": options.get("inner", "inductor"), "inner_options": inner_options}


def _named_backend(model: nn.Module, options: Mapping[str, Any], stamp: tuple[str, int, int] | None) -> PruningBackend:
    """Return the backend of a model for some options; make it if it does not exist yet."""
    uses = _NAMED_USES.setdefault(model, [])
    for use in uses:
        if use.stamp == stamp and use.options == options:
            return use.backend
    plan = options["plan"]
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    backend = PruningBackend(model, loaded, options["inner"], options["inner_options"])
    uses.append(_NamedUse(options, stamp, backend))
    return backend


def _file_stamp(path: Any) -> tuple[str, int, int]:
    """Return the path, the time of the last change in ns and the size in bytes of a file."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise PlanError(f"the plan file {os.fspath(path)!r} cannot be read: {error.strerror}") from None
    return str(Path(path).resolve()), found.st_mtime_ns, found.st_size


def _refuse_changed_file(compiled: Callable[..., Any], stamp: tuple[str, int, int] | None) -> Callable[..., Any]:
    """Raise an error when a compiled graph runs and the plan file was changed. A deleted file raises none."""
    if stamp is None:
        return compiled

    def run(*args: Any) -> Any:
        if os.path.exists(stamp[0]) and _file_stamp(stamp[0]) != stamp:
            raise PlanError(f"the plan file {stamp[0]!r} changed after it was compiled; call torch.compiler.reset()")
        return compiled(*args)

    return run
