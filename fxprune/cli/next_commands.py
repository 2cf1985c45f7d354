"""Says which command to type next, with the options of the command that just ran."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from fxprune.cli.options import DataOptions, ModelOptions
from fxprune.cli.output import PICTURE
from fxprune.planning.plan import Plan
from fxprune.reporting.measurement_tables import NextSteps

PLAN_FILE = "plan.json"


def after_pruning(plan: Plan, model: ModelOptions, data: DataOptions, out: Path | None) -> NextSteps:
    """Return the commands for a pruned model that was saved in a folder; none if it was not saved.

    Examples
    --------
    >>> after_pruning(plan, ModelOptions("bundled"), DataOptions(), Path("out"))[0]   # doctest: +SKIP
    ('fxprune eval bundled --pruned out', 'mAP on labelled images')
    """
    if out is None:
        return ()
    own = [model.model, "--pruned", str(out), *_given(model, "model", "pruned")]
    boxes = [("eval", _given(data, "limit"), "mAP on labelled images")] if "boxes" in plan.settings else []
    if data.images is not None and data.annotations is None:
        boxes = [("eval", [*_given(data, "limit"), "--annotations", "FILE.json"], words) for _, _, words in boxes]
    picture = f"a picture for a page; {out / PICTURE} is one to explore"
    return (
        *((_join(name, *own, *more), words) for name, more, words in boxes),
        (_join("draw", model.model, "pruned.svg", *own[1:]), picture),
        (f"fxprune.load(model, {str(out)!r})", "the pruned model in Python; model: the unpruned one"),
    )


def after_analysis(model: ModelOptions, data: DataOptions, budget: float, cost: str, out: Path | None) -> NextSteps:
    """Return the command that removes what a plan marks."""
    more = [*_given(model, "model"), *_given(data)]
    if out is not None:
        call = _join("apply", model.model, str(out / PLAN_FILE), "--heal", "affine", "--out", "pruned", *more)
    else:
        call = _join("prune", model.model, "--budget", f"{budget:g}", "--cost", cost, "--out", "pruned", *more)
    return ((call, "remove them and heal what is left"),)


def _join(command: str, *words: str) -> str:
    return shlex.join(["fxprune", command, *words])


def _given(group: Any, *without: str) -> list[str]:
    """Return the options of a group that differ from their defaults, as words of a command line."""
    return [word for name, value in _changed(group) if name not in without for word in (f"--{name}", str(value))]


def _changed(group: Any) -> Iterator[tuple[str, Any]]:
    for each in fields(group):
        value = getattr(group, each.name)
        if value != each.default:
            yield each.name, value
