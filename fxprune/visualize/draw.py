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
"""What each suffix is written by."""


def draw(what: Drawable, path: str | PathLike[str], *, plan: Plan | None = None) -> None:
    """Draw a network with its blocks, their importance, and what was removed.

    Parameters
    ----------
    what : Analysis, Plan or Module
        An analysis shows what would go at every budget; a plan, or what `fxprune.compile` or `fxprune.apply`
        returned, shows what goes or went.
    path : path
        Where to. Its suffix says what is written: ``.html`` is a page to explore, one file that asks nothing of any
        network; ``.svg`` and ``.png`` are still pictures (``pip install "fxprune[draw]"``); ``.dot`` (Graphviz) and
        ``.mmd`` (Mermaid) are texts. A file that is there is replaced.
    plan : Plan, optional
        Of an analysis: the plan to show first. Without it nothing is removed at first.

    Raises
    ------
    SettingError
        If `path` is no path or ends in no format that is known, or if a package that the format takes is missing.
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
    """Write what `fxprune.visualize.network_view.build_view` returned in the format that the path's suffix says."""
    target = _check_path(path)
    if not picture["blocks"]:
        raise PlanError("the plan holds no graph to draw; make it anew with fxprune.analyze and Analysis.plan")
    content = FORMATS[target.suffix.lower()](picture)
    with atomic_write(target) as draft:
        draft.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def _check_path(path: Any) -> Path:
    text = os.fspath(path) if isinstance(path, (str, PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise SettingError(f"path is {path!r}; give the path of a file")
    target = Path(os.path.realpath(text))
    if target.suffix.lower() not in FORMATS:
        raise SettingError(
            f"{path} ends in no format that can be drawn; the known ones are {', '.join(sorted(FORMATS))}"
        )
    return target
