"""Files that `fxprune.draw` writes: formats, errors, and escaped names."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any
from xml.etree import ElementTree

import pydot
import pytest
from torch import nn

import fxprune
from fxprune import PlanError, SettingError, StorageError
from fxprune.visualize.draw import FORMATS, write_view
from fxprune.visualize.graphviz_mermaid import render_dot, render_mermaid
from fxprune.visualize.renderer import evaluate_js, render_page, render_png, render_svg
from tests.helpers.pictures import PICTURES, Row, residual

SVG = "{http://www.w3.org/2000/svg}"
# Formats and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", sorted(FORMATS))
@pytest.mark.parametrize("what", ["analysis", "plan", "pruned_tiny"])
def test_draw_writes_everything_in_every_format(
    what: str, suffix: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = tmp_path / "new folder" / f"tiny{suffix.upper()}"
    fxprune.draw(request.getfixturevalue(what), str(path))
    assert path.stat().st_size > 200
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_draw_replaces_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.dot"
    path.write_text("old")
    write_view(residual(), path)
    assert path.read_text() == render_dot(residual())


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.svg.gz", ".png"])
def test_draw_with_unknown_suffix_names_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"\.dot, \.html, \.mmd, \.png, \.svg"):
        write_view(residual(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [None, 3, b"a.svg", "a\0.svg"])
def test_draw_refuses_what_is_no_path_before_any_work(path: Any) -> None:
    with pytest.raises(SettingError, match="path of a file"):
        fxprune.draw(nn.Identity(), path)


def test_draw_to_an_unwritable_path_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    for path in (tmp_path / "file" / "a.dot", tmp_path / "folder.svg"):
        with pytest.raises(StorageError, match="cannot be written"):
            write_view(residual(), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.svg"]


@pytest.mark.parametrize(("suffix", "package"), [(".svg", "quickjs"), (".png", "resvg_py")])
def test_draw_names_a_missing_extra_and_text_formats_need_none(
    suffix: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError, match=r'pip install "fxprune\[draw\]"'):
        write_view(residual(), tmp_path / f"a{suffix}")
    monkeypatch.setitem(sys.modules, "quickjs", None)
    for other in (".html", ".dot", ".mmd"):
        write_view(residual(), tmp_path / f"a{other}")


def test_write_view_refuses_an_empty_view(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"fxprune\.analyze"):
        write_view({**residual(), "blocks": [], "nodes": [], "edges": [], "block_edges": []}, tmp_path / "a.dot")


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_write_view_leaves_out_unknown_values(suffix: str, tmp_path: Path) -> None:
    picture = copy.deepcopy({**residual(), "initial": None, "plans": []})
    for region in picture["regions"]:
        region |= {"score": float("nan"), "flops": None, "params": None}
    for block in picture["blocks"]:
        block |= {"flops": None, "params": None, "summary": ""}
    picture["before"] = {"flops": 0, "params": 0, "blocks": 0}
    path = tmp_path / f"a{suffix}"
    write_view(picture, path)
    text = path.read_bytes().decode("latin-1")
    shown = re.findall(r'id="data">(.*?)</script>|<text[^>]*>(.*?)</text>|label="(.*?)"|\["(.*?)"\]', text, re.DOTALL)
    assert shown or suffix == ".png"
    assert not re.search(r"NaN|Infinity|undefined|None|null%|null F", str(shown))


# Names that mean harm ------------------------------------------------------------------------------------------------


def test_page_escapes_names() -> None:
    text = render_page(PICTURES["harm"])
    assert text.count("</script>") == text.count("<script") == 2
    assert "<img" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data) == PICTURES["harm"]


def test_page_makes_no_network_request() -> None:
    text = render_page(PICTURES["detector"])
    addresses = set(re.findall(r"\w+://[^\s\"'`<)]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "a name space is no request"
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\((?!data:)|sourceMappingURL", text)
    assert "default-src 'none'" in text


def test_svg_escapes_names() -> None:
    root = ElementTree.fromstring(render_svg(PICTURES["harm"]))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg",
        "title",
        "style",
        "g",
        "rect",
        "path",
        "text",
    }
    assert any("<img" in (element.text or "") for element in root.iter(f"{SVG}text"))


# Texts for Graphviz and Mermaid --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pydot")
@pytest.mark.parametrize("name", sorted(PICTURES))
def test_dot_can_be_parsed(name: str) -> None:
    picture = PICTURES[name]
    graphs = pydot.graph_from_dot_data(render_dot(picture))
    assert len(graphs) == 1
    assert len(graphs[0].get_edges()) == len(picture["block_edges"])
    if which("dot"):
        done = subprocess.run(["dot", "-Tplain"], input=render_dot(picture).encode(), capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.count(b"\nnode ") == len(picture["blocks"]) + 2


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_mermaid_has_each_block_and_edge_once(name: str) -> None:
    picture = PICTURES[name]
    lines = render_mermaid(picture).splitlines()
    assert (lines[0], lines[2], lines[3]) == ("---", "---", "flowchart TB")
    assert json.loads(lines[1].removeprefix("title: "))
    boxes = [
        line for line in lines if re.fullmatch(r' +\w+(\["[^"<>\\`\[\]]*(<br/>[^"<>]*)?"\]|\(\["[^"<>]*"\]\))', line)
    ]
    assert len(boxes) == len(picture["blocks"]) + 2
    assert sum(bool(re.fullmatch(r"  \w+ (-->|-\.->|==>) \w+", line)) for line in lines) == len(picture["block_edges"])
    assert lines.count("  end") == sum(line.lstrip().startswith("subgraph ") for line in lines)


def test_dot_and_mermaid_mark_removed_blocks() -> None:
    picture = residual()
    first, second = (f"b{picture['regions'][i]['nodes'] and _block(picture, i)}" for i in (1, 3))
    assert f"  class {first},{second} removed" in render_mermaid(picture)
    assert render_dot(picture).count("\\nremoved") == 2


def _block(picture: Row, region: int) -> int:
    block: int = picture["nodes"][picture["regions"][region]["exit"]]["block"]
    return block


# Still pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "detector"])
def test_svg_has_labels_legend_and_savings(name: str) -> None:
    picture = {**PICTURES[name], "initial": 1}
    texts = [element.text or "" for element in ElementTree.fromstring(render_svg(picture)).iter(f"{SVG}text")]
    for block in picture["blocks"]:
        label = block["label"].removeprefix(block["island"] + ".")
        assert block["glue"] or label in texts
    after = picture["plans"][1]["after"]["flops"] / picture["before"]["flops"] - 1
    caption = " ".join(texts[texts.index(picture["title"]) + 1 :])
    assert caption.startswith("budget 20 % of FLOPs: 2 regions removed")
    assert f"{abs(after):.1%}".replace("%", " %") in caption
    assert {"importance by rank", "least", "most", "removed", picture["title"]} <= set(texts)


def test_svg_shows_milliseconds_when_measured() -> None:
    picture = json.loads(json.dumps(PICTURES["residual"])) | {"initial": 1, "cost": "latency"}
    picture["before"]["latency_ms"] = 1234.5
    picture["plans"][1]["after"]["latency_ms"] = 987.6
    texts = [element.text or "" for element in ElementTree.fromstring(render_svg(picture)).iter(f"{SVG}text")]
    caption = " ".join(texts)
    assert "of latency: 2 regions removed" in caption
    assert "1230 to 988 (\u221220.0 %)" in caption
    unmeasured = json.dumps(
        [element.text for element in ElementTree.fromstring(render_svg(PICTURES["residual"])).iter()]
    )
    assert "latency" not in unmeasured


def test_score_colours_are_cividis() -> None:
    colormaps = pytest.importorskip("matplotlib", reason="pip install matplotlib").colormaps
    shares = [0.0, 0.1, 0.33, 0.5, 0.77, 1.0]
    for share, found in zip(shares, evaluate_js("input.shares.map(fxprune.cividis)", shares=shares), strict=True):
        colour = [int(found[i : i + 2], 16) for i in (1, 3, 5)]
        assert colour == pytest.approx([255 * value for value in colormaps["cividis"](share)[:3]], abs=6)


def test_png_shows_texts_and_boxes() -> None:
    content = render_png(residual())
    rows, width = pixels(content)
    assert len({rows[i : i + 3] for i in range(0, len(rows), 3)}) > 20, "one colour would be a blank picture"
    root = ElementTree.fromstring(render_svg(residual()))
    assert width == 2 * int(root.attrib["width"])
    for element in root.iter(f"{SVG}text"):
        element.text = ""
    assert ink(content) > ink(drawn(ElementTree.tostring(root, encoding="unicode"))) + 5000


def drawn(svg: str) -> bytes:
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=2))


def ink(content: bytes) -> int:
    """How many pixels are not white."""
    image, _ = pixels(content)
    return sum(image[i : i + 3] != b"\xff\xff\xff" for i in range(0, len(image), 3))


def pixels(content: bytes) -> tuple[bytes, int]:
    """RGB bytes and width of a PNG."""
    import io

    import numpy
    from PIL import Image

    image = Image.open(io.BytesIO(content)).convert("RGB")
    return numpy.asarray(image).tobytes(), image.width
