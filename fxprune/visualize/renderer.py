"""Pages and still pictures: one renderer in JavaScript, which a browser runs in the page and QuickJS runs here."""

from __future__ import annotations

import base64
import importlib
import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import as_file, files
from types import ModuleType
from typing import Any

from fxprune.errors import SettingError
from fxprune.runtime.json_text import plain_json, script_safe

Picture = Mapping[str, Any]

RENDERER = (
    "shims.js",
    "dagre.min.js",
    "scene.js",
    "edges.js",
    "columns.js",
    "layout.js",
    "markup.js",
    "picture.js",
    "figure.js",
)
PAGE = (*RENDERER, "panel.js", "walk.js", "view.js", "page.js")
FONTS = {400: "Inter-Regular.ttf", 600: "Inter-SemiBold.ttf"}
"""By weight; the renderer sizes boxes by their advance widths."""

SHEET = {"width": 1200, "height": 1200, "most": 1}
"""The proportions that a still picture is wrapped to, in pixels."""
ZOOM = 2
"""Pixels of a PNG per pixel of the SVG."""
STACK = 64 * 1024 * 1024


def page_text(picture: Picture) -> str:
    """A page to explore, in one file: the renderer, the font and the data are in it."""
    parts = {
        "title": escape(str(picture["title"])),
        "style": _font_style() + _read("page.css"),
        "data": script_safe(picture),
        "script": "\n".join(_read(name) for name in PAGE),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html"))


def svg_text(picture: Picture) -> str:
    """A still picture in the light theme with legend and caption, of the plan that is shown first."""
    state = {"open": {}, "plan": picture["initial"], "theme": "light"}
    call = "fxprune.figure(input.picture, input.state, input.sheet, input.style)"
    text: str = evaluate(call, picture=picture, state=state, sheet=SHEET, style=_font_style())
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + text + "\n"


def png_bytes(picture: Picture) -> bytes:
    """The still picture as PNG, its texts in the font that is shipped with it."""
    resvg = _module("resvg_py", "resvg-py", ".png")
    folder = files("fxprune.visualize") / "web"
    with as_file(folder / FONTS[400]) as regular, as_file(folder / FONTS[600]) as bold:
        drawn = resvg.svg_to_bytes(
            svg_string=svg_text(picture),
            font_files=[str(regular), str(bold)],
            font_family="Inter",
            sans_serif_family="Inter",
            zoom=ZOOM,
        )
    return bytes(drawn)


def evaluate(expression: str, **values: Any) -> Any:
    """Evaluate a JavaScript expression of the renderer; `values` are the properties of ``input``.

    Examples
    --------
    >>> evaluate("fxprune.percent(input.share)", share=0.25)       # doctest: +SKIP
    '25 %'
    """
    engine = _module("quickjs", "quickjs", ".svg and .png").Context()
    engine.set_max_stack_size(STACK)
    for name in RENDERER:
        engine.eval(_read(name))
    engine.set("text", plain_json(values))
    engine.eval("globalThis.input = JSON.parse(text)")
    return json.loads(engine.eval(f"JSON.stringify({expression})"))


def _font_style() -> str:
    rules = []
    for weight, name in FONTS.items():
        content = base64.b64encode((files("fxprune.visualize") / "web" / name).read_bytes()).decode("ascii")
        source = f"url(data:font/ttf;base64,{content})"
        rules.append(f'@font-face{{font-family:"Inter";font-weight:{weight};src:{source} format("truetype")}}')
    return "\n".join(rules) + "\n"


def _read(name: str) -> str:
    return (files("fxprune.visualize") / "web" / name).read_text(encoding="utf-8")


def _module(name: str, package: str, formats: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(
            f'{formats} takes the package {package}: pip install "fxprune[draw]"; .html, .dot and .mmd take none'
        ) from error
