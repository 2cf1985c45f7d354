"""The blocks of a network as Graphviz and Mermaid text; removed blocks are dashed, edges around them are bold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fxprune.visualize.network_view import IMAGES_NODE, RESULTS_NODE

Picture = Mapping[str, Any]

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
PORTS = {IMAGES_NODE: "images", RESULTS_NODE: "outputs"}


@dataclass(frozen=True)
class Box:
    """One block: identifier, label lines, island, and status (`kept`, `partly` removed, or `removed`)."""

    name: str
    lines: tuple[str, ...]
    island: str
    status: str
    glue: bool


def render_dot(picture: Picture) -> str:
    """Write the blocks as a Graphviz digraph."""
    lines = [
        "digraph network {",
        f"  graph [label={quote(make_caption(picture))}, labelloc=b, rankdir=TB];",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica"];',
    ]
    for number, (island, boxes) in enumerate(group_by_island(picture)):
        inside = [f"  {box.name} [{_dot_look(box)}];" for box in boxes]
        if island:
            inside = [
                f"  subgraph cluster_{number} {{",
                f"    label={quote(island)};",
                *("  " + x for x in inside),
                "  }",
            ]
        lines += inside
    looks = {"plain": "", "ghost": " [style=dashed, color=gray60]", "wire": ' [color="#d6246e", penwidth=2.5]'}
    lines += [f"  {source} -> {target}{looks[look]};" for source, target, look in styled_edges(picture)]
    return "\n".join([*lines, "}"]) + "\n"


def render_mermaid(picture: Picture) -> str:
    """Write the blocks as a Mermaid flowchart."""
    lines = ["---", f"title: {quote(make_caption(picture))}", "---", "flowchart TB"]
    for number, (island, boxes) in enumerate(group_by_island(picture)):
        inside = [
            f'  {box.name}{"([" if box.glue else "["}"{_escape_box(box)}"{"])" if box.glue else "]"}' for box in boxes
        ]
        if island:
            inside = [f'  subgraph i{number}["{escape_entities(island)}"]', *("  " + line for line in inside), "  end"]
        lines += inside
    arrows = {"plain": "-->", "ghost": "-.->", "wire": "==>"}
    lines += [f"  {source} {arrows[look]} {target}" for source, target, look in styled_edges(picture)]
    lines.append("  classDef removed stroke-dasharray:6 4,fill:#fff,color:#57606a")
    lines.append("  classDef partly stroke-dasharray:6 4")
    for status in ("removed", "partly"):
        names = [box.name for _, boxes in group_by_island(picture) for box in boxes if box.status == status]
        lines += [f"  class {','.join(names)} {status}"] if names else []
    return "\n".join(lines) + "\n"


def make_caption(picture: Picture) -> str:
    """Describe the plan that is shown first, in one line."""
    title = str(picture["title"])
    if picture["initial"] is None:
        return title
    plan = picture["plans"][picture["initial"]]
    return f"{title}: budget {plan['budget']:.3g} of {picture['cost']}, {len(plan['removed'])} regions removed"


def group_by_island(picture: Picture) -> Iterator[tuple[str, list[Box]]]:
    """Yield the boxes of each island; the name is empty for a box that is alone in its island."""
    gone = _removed_nodes(picture)
    groups: dict[str, list[Box]] = {}
    for block in picture["blocks"]:
        groups.setdefault(block["island"], []).append(_box(picture, block, gone))
    ports = {end for edge in picture["block_edges"] for end in edge if end in PORTS}
    yield "", [Box(_name(end), (PORTS[end],), "", "kept", True) for end in sorted(ports, reverse=True)]
    for island, boxes in groups.items():
        yield island if len(boxes) > 1 else "", boxes


def styled_edges(picture: Picture) -> Iterator[tuple[str, str, str]]:
    """Yield pairs of box names with the edge style: `plain`, `ghost` (removed) or `wire` (past a removed block)."""
    gone = _removed_nodes(picture)
    removed = {block["id"] for block in picture["blocks"] if _status(block, gone) == "removed"}
    pairs = [(source, target) for source, target in picture["block_edges"]]
    stand_ins = _stand_ins(picture, removed, pairs)
    through = {block: {source for source, target in pairs if target == block} & stand_ins[block] for block in stand_ins}
    rejoined = {
        (source, target)
        for block in stand_ins
        if not through[block]
        for source in stand_ins[block]
        for _, target in (pair for pair in pairs if pair[0] == block)
    }
    for source, target in pairs:
        into = target not in removed or source in through.get(target, ())
        out = source not in removed or bool(through.get(source))
        touched = source in removed or target in removed
        wire = (touched and into and out) or (source, target) in rejoined
        yield _name(source), _name(target), "wire" if wire else "ghost" if touched else "plain"


def _stand_ins(picture: Picture, removed: set[int], pairs: list[tuple[int, int]]) -> dict[int, set[int]]:
    """Return, for each removed block, the blocks whose values are read instead of its own."""
    found: dict[int, set[int]] = {}
    for region in _removed_regions(picture):
        block = picture["nodes"][region["exit"]]["block"]
        if block not in removed:
            continue
        stand_in = region["stand_in"]
        feeding = {source for source, target in pairs if target == block}
        found[block] = feeding if stand_in is None else {_block_of(picture, stand_in)}
    return found


def _block_of(picture: Picture, node: int) -> int:
    block: int = node if node < 0 else picture["nodes"][node]["block"]
    return block


def _removed_regions(picture: Picture) -> list[dict[str, Any]]:
    initial = picture["initial"]
    return [] if initial is None else [picture["regions"][index] for index in picture["plans"][initial]["removed"]]


def _removed_nodes(picture: Picture) -> set[int]:
    return {node for region in _removed_regions(picture) for node in region["nodes"]}


def _status(block: Mapping[str, Any], gone: set[int]) -> str:
    count = sum(node in gone for node in block["nodes"])
    return "kept" if not count else "removed" if count == len(block["nodes"]) else "partly"


def _box(picture: Picture, block: Mapping[str, Any], gone: set[int]) -> Box:
    status = _status(block, gone)
    label = block["summary"] if block["glue"] else block["label"]
    rank = None if block["region"] is None else picture["regions"][block["region"]]["rank"]
    second = {"removed": "removed", "partly": "part removed"}.get(status, "" if rank is None else f"rank {rank}")
    lines = (label, second) if second else (label,)
    return Box(_name(block["id"]), lines, block["island"], status, bool(block["glue"]))


def _name(block: int) -> str:
    return PORTS.get(block, f"b{block}")


def _dot_look(box: Box) -> str:
    label = f"label={quote(*box.lines)}"
    if box.status == "removed":
        return f'{label}, style="rounded,dashed", fontcolor=gray40'
    if box.status == "partly":
        return f'{label}, style="rounded,filled,dashed"'
    return f"{label}, shape=ellipse" if box.glue else label


def quote(*lines: str) -> str:
    """Return lines as one Graphviz string."""
    escaped = [CONTROL.sub(" ", line).replace("\\", "\\\\").replace('"', '\\"') for line in lines]
    return '"' + "\\n".join(escaped) + '"'


def _escape_box(box: Box) -> str:
    return "<br/>".join(escape_entities(line) for line in box.lines)


def escape_entities(text: str) -> str:
    """Return a text in which every character that Mermaid could interpret is a numeric entity."""
    return re.sub(r"[^\w .,:()+·…-]", lambda found: f"#{ord(found[0])};", CONTROL.sub(" ", text))
