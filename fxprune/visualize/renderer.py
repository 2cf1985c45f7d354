"""Pages and static pictures by one JavaScript renderer: a browser runs it in the page, QuickJS runs it here."""

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
from fxprune.runtime.json_text import dump_plain_json, dump_script_json

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
"""Fonts by weight; the renderer computes the sizes of boxes from their advance widths."""

STILL_SIZE = {"width": 1200, "height": 1200, "most": 1}
"""Width and height in pixels that the columns of a static picture fill; `most` is the maximum scale."""
PNG_SCALE = 2
"""Pixels of a PNG per pixel of the SVG."""
JS_STACK_BYTES = 64 * 1024 * 1024


def render_page(picture: Picture) -> str:
    """Return an interactive page as one file that contains the renderer, the font and the data."""
    parts = {
        "title": escape(str(picture["title"])),
        "style": _font_style() + _read("page.css"),
        "data": dump_script_json(picture),
        "script": "\n".join(_read(name) for name in PAGE),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html"))


def render_svg(picture: Picture) -> str:
    """Return a static picture of the plan that is shown first, in the light theme, with legend and caption."""
    state = {"open": {}, "plan": picture["initial"], "theme": "light"}
    call = "fxprune.figure(input.picture, input.state, input.sheet, input.style)"
    text: str = evaluate_js(call, picture=picture, state=state, sheet=STILL_SIZE, style=_font_style())
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + text + "\n"


def render_png(picture: Picture) -> bytes:
    """Return the static picture as PNG; its text is in the font that is part of fxprune."""
    resvg = _module("resvg_py", "resvg-py", ".png")
    folder = files("fxprune.visualize") / "web"
    with as_file(folder / FONTS[400]) as regular, as_file(folder / FONTS[600]) as bold:
        drawn = resvg.svg_to_bytes(
            svg_string=render_svg(picture),
            font_files=[str(regular), str(bold)],
            font_family="Inter",
            sans_serif_family="Inter",
            zoom=PNG_SCALE,
        )
    return bytes(drawn)


def evaluate_js(expression: str, **values: Any) -> Any:
    """Evaluate a JavaScript expression in the renderer; `values` are the properties of ``input``.

    Examples
    --------
    >>> evaluate_js("fxprune.percent(input.share)", share=0.25)       # doctest: +SKIP
    '25 %'
    """
    engine = _module("quickjs", "quickjs", ".svg and .png").Context()
    engine.set_max_stack_size(JS_STACK_BYTES)
    for name in RENDERER:
        engine.eval(_read(name))
    engine.set("text", dump_plain_json(values))
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
            f'{formats} needs the package {package}: pip install "fxprune[draw]"; .html, .dot and .mmd need no package'
        ) from error
