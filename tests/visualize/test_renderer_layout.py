"""The layout of a drawing: boxes, frames, edges, and the path past removed blocks."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.visualize.graphviz_mermaid import styled_edges
from fxprune.visualize.renderer import STILL_SIZE, evaluate_js
from tests.helpers.pictures import PICTURES, Row, detector, residual


def layout(picture: Row, **state: Any) -> Row:
    found: Row = evaluate_js(
        "fxprune.layout(input.picture, Object.assign({open: {}, plan: null}, input.state), input.fit)",
        picture=picture,
        state=state,
        fit=STILL_SIZE if state.pop("wrapped", False) else None,
    )
    return found


def styles(picture: Row, **state: Any) -> dict[tuple[str, str], str]:
    return {(edge["from"], edge["to"]): edge["style"] for edge in layout(picture, **state)["edges"]}


def _block(picture: Row, region: int) -> int:
    return _block_of(picture, picture["regions"][region]["exit"])


# Where things lie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("unfolded", [False, True])
@pytest.mark.parametrize("name", sorted(PICTURES))
def test_boxes_do_not_overlap_and_lie_on_the_canvas(name: str, unfolded: bool, wrapped: bool) -> None:
    picture = PICTURES[name]
    opened = {block["id"]: True for block in picture["blocks"]} if unfolded else {}
    plan = layout(picture, open=opened, wrapped=wrapped)
    boxes = [(box["x"] - box["w"] / 2, box["y"] - box["h"] / 2, box["w"], box["h"]) for box in plan["boxes"]]
    assert len(boxes) == len(picture["nodes"] if unfolded else picture["blocks"]) + 2
    for index, (x, y, w, h) in enumerate(boxes):
        assert x >= 0 and y >= 0 and x + w <= plan["width"] and y + h <= plan["height"]  # noqa: PT018
        for a, b, c, d in boxes[:index]:
            assert x >= a + c or a >= x + w or y >= b + d or b >= y + h


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_edges_avoid_boxes_and_boxes_avoid_other_frames(name: str) -> None:
    plan = layout(PICTURES[name], open={"1": True, "4": True}, wrapped=True)
    for box in plan["boxes"]:
        top, bottom, side = box["y"] - box["h"] / 2, box["y"] + box["h"] / 2, box["w"] / 2
        for edge in plan["edges"]:
            strange = box["key"] not in (edge["from"], edge["to"])
            over = [
                s for s in edge["stops"] if abs(s["x"] - box["x"]) < side and s["top"] < bottom and s["bottom"] > top
            ]
            assert not (strange and over)
        parents = {frame["key"]: frame["parent"] for frame in plan["frames"]}
        own = {box["parent"], parents.get(box["parent"])}
        for frame in plan["frames"]:
            inside = frame["left"] < box["x"] < frame["right"] and frame["top"] < box["y"] < frame["bottom"]
            assert not inside or frame["key"] in own


def test_tall_network_is_wrapped_into_equal_columns() -> None:
    picture = residual(4, 5)
    tall, wide = layout(picture), layout(picture, wrapped=True)
    assert tall["columns"] == 1
    assert tall["height"] > 3 * tall["width"]
    assert wide["columns"] > 1
    assert 0.5 < wide["width"] / wide["height"] < 2


def test_layout_does_not_depend_on_the_plan() -> None:
    picture = residual()
    places = [
        [(box["key"], box["x"], box["y"]) for box in layout(picture, plan=plan)["boxes"]] for plan in (None, 0, 3)
    ]
    assert places[0] == places[1] == places[2]


# The way the signal takes --------------------------------------------------------------------------------------------


def test_bypassed_block_is_drawn_as_a_wire() -> None:
    picture = residual()
    region = picture["regions"][1]
    before, block = _block_of(picture, region["stand_in"]), _block(picture, 1)
    found = styles(picture, plan=0)
    assert found[f"b{before}", f"b{block}"] == found[f"b{block}", f"b{block + 1}"] == "wire"
    assert set(styles(picture, plan=None).values()) == {"plain"}


def _block_of(picture: Row, node: int) -> int:
    block: int = picture["nodes"][node]["block"]
    return block


def test_unfolded_bypass_leads_past_its_nodes() -> None:
    picture = residual()
    region = picture["regions"][1]
    before, block = _block_of(picture, region["stand_in"]), _block(picture, 1)
    found = styles(picture, plan=0, open={block: True})
    assert found[f"b{before}", f"b{block + 1}"] == "wire"
    inner = {pair for pair in found if any(key.startswith("n") for key in pair)}
    assert {found[pair] for pair in inner} == {"ghost"}


def test_dropped_branch_is_faded_and_the_other_operand_a_wire() -> None:
    picture = residual()
    found = styles(picture, plan=2)
    branch, down, total = 1, 2, 3
    assert found["b0", f"b{branch}"] == found[f"b{branch}", f"b{total}"] == "ghost"
    assert found[f"b{down}", f"b{total}"] == "wire"
    assert found["b0", f"b{down}"] == "plain"


def test_partly_removed_block_is_labelled() -> None:
    picture = residual()
    (partly,) = [box for box in layout(picture, plan=3)["boxes"] if box["status"] == "partly"]
    assert partly["note"].startswith("part removed")
    assert partly["block"] == _block(picture, 4)


def test_island_inputs_stand_in_for_a_removed_first_region() -> None:
    picture = detector()
    picture["regions"][6]["stand_in"] = None
    first = _block(picture, 6)
    found = styles(picture, plan=0)
    assert [found[pair] for pair in found if pair[1] == f"b{first}"] == ["wire"] * 3
    assert found[f"b{first}", f"b{first + 1}"] == "wire"


@pytest.mark.parametrize("initial", [0, 1, 2, 3])
def test_dot_edges_have_the_styles_of_the_layout(initial: int) -> None:
    picture = {**residual(), "initial": initial}
    written = {(source, target): look for source, target, look in styled_edges(picture)}
    ports = {"in": "images", "out": "outputs"}
    drawn = {(ports.get(a, a), ports.get(b, b)): look for (a, b), look in styles(picture, plan=initial).items()}
    assert written == drawn
