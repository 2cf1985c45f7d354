"""Pictures of a network with its pruned blocks, written to files."""

from __future__ import annotations

import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from fxprune.errors import PlanError, SettingError
from fxprune.planning.plan import Plan
from fxprune.runtime.atomic_write import atomic_write
from fxprune.visualize.graphviz_mermaid import render_dot, render_mermaid
from fxprune.visualize.network_view import Drawable, build_view
from fxprune.visualize.renderer import render_page, render_png, render_svg

Picture = dict[str, Any]

FORMATS: dict[str, Callable[[Picture], str | bytes]] = {
    ".html": render_page,
    ".svg": render_svg,
    ".png": render_png,
    ".dot": render_dot,
    ".mmd": render_mermaid,
}
"""The function that writes each suffix."""


def draw(what: Drawable, path: str | PathLike[str], *, plan: Plan | None = None) -> None:
    """Draw a network with its blocks, their importance, and the removed regions.

    Parameters
    ----------
    what : Analysis, Plan or Module
        For an analysis, the picture shows the removals at every budget; for a plan, its removals; for a model that
        `fxprune.compile` or `fxprune.apply` returned, the removals that were applied.
    path : path
        The output file; an existing file is replaced. The suffix sets the format: ``.html`` is an interactive page,
        one file that loads nothing from the internet; ``.svg`` and ``.png`` are static pictures
        (``pip install "fxprune[draw]"``); ``.dot`` (Graphviz) and ``.mmd`` (Mermaid) are text.
    plan : Plan, optional
        For an analysis: the plan to show first. By default, nothing is removed at first.

    Raises
    ------
    SettingError
        If `path` is not a path, if its suffix is not known, or if a package that the format needs is missing.
    StorageError
        If the file cannot be written.
    ModelError
        If a model was not pruned by fxprune.
    PlanError
        If a plan holds no graph.

    Examples
    --------
    >>> fxprune.draw(fxprune.analyze(model, calib_loader), "model.html")  # doctest: +SKIP
    >>> fxprune.draw(pruned, "pruned.svg")                                # doctest: +SKIP
    """
    target = _check_path(path)
    write_view(build_view(what, plan), target)


def write_view(picture: Picture, path: str | PathLike[str]) -> None:
    """Write the output of `fxprune.visualize.network_view.build_view`; the suffix of the path sets the format."""
    target = _check_path(path)
    if not picture["blocks"]:
        raise PlanError("the plan holds no graph to draw; make a new plan with fxprune.analyze and Analysis.plan")
    content = FORMATS[target.suffix.lower()](picture)
    with atomic_write(target) as draft:
        draft.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def _check_path(path: Any) -> Path:
    text = os.fspath(path) if isinstance(path, (str, PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise SettingError(f"path is {path!r}; it must be the path of a file")
    target = Path(os.path.realpath(text))
    if target.suffix.lower() not in FORMATS:
        raise SettingError(f"{path} has no suffix of a known format; known: {', '.join(sorted(FORMATS))}")
    return target
