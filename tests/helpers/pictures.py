"""Network views made by hand: a residual network, a detector of two islands, names that need escaping."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


class Sketch:
    """Collects the parts of a picture; nodes, blocks and regions are numbered as they come."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.nodes: list[Row] = []
        self.blocks: list[Row] = []
        self.regions: list[Row] = []
        self.edges: list[list[int]] = []
        self.block_edges: list[list[int]] = []
        self.islands: dict[str, Row] = {}

    def block(self, label: str, ops: list[str], after: list[int], *, island: str = "", **more: Any) -> int:
        """A chain of nodes, as one block that reads the last nodes of other blocks; -1 is the input."""
        number, first = len(self.blocks), len(self.nodes)
        ids = list(range(first, first + len(ops)))
        for id_, op in zip(ids, ops, strict=True):
            name = f"{label}.{id_ - first}"
            shape = [2, 8, 16, 16]
            row = {"id": id_, "name": name, "op": op, "island": island, "shape": shape, "flops": 5e5, "grad_act": 0.5}
            self.nodes.append({**row, "block": number})
        self.edges += [[a, a + 1] for a in ids[:-1]]
        self.edges += [[self.blocks[b]["nodes"][-1], first] for b in after if b >= 0]
        self.block_edges += [[b, number] for b in after]
        glue = bool(more.get("glue", False))
        row = {"id": number, "label": label, "region": None, "nodes": ids, "island": island, "glue": glue}
        row |= {"summary": " · ".join(ops), "reason": more.get("reason"), "flops": 5e5 * len(ops), "params": 100}
        self.blocks.append(row)
        self.islands.setdefault(island, {"name": island, "note": "Sequential"})
        return number

    def region(self, name: str, kind: str, block: int, score: float, stand_in: int, part: slice = slice(None)) -> int:
        """A region of (part of) a block's nodes; the outermost becomes the block's."""
        number, nodes = len(self.regions), self.blocks[block]["nodes"][part]
        row = {"name": name, "kind": kind, "score": score, "rank": 0, "flops": 5e5 * len(nodes), "params": 100}
        row |= {"layers": [f"{name}.0"], "nodes": nodes, "exit": nodes[-1], "stand_in": stand_in}
        self.regions.append(row)
        if nodes == self.blocks[block]["nodes"]:
            self.blocks[block]["region"] = number
        return number

    def picture(self, removed: list[list[int]], initial: int | None) -> Row:
        """The sketch in the form that `fxprune.visualize.network_view.build_view` returns."""
        for rank, row in enumerate(sorted(self.regions, key=lambda row: float(row["score"])), start=1):
            row["rank"] = rank
        flops = sum(row["flops"] for row in self.blocks)
        before = {"flops": flops, "params": 100 * len(self.blocks), "blocks": len(self.regions)}
        plans = [self._plan(before, index, indices) for index, indices in enumerate(removed)]
        settings = {
            "criterion": "fisher",
            "images": 64,
            "targets": "labels",
            "seed": 0,
            "versions": {"torch": "2.15.0"},
        }
        refused = [{"name": row["label"], "reason": row["reason"]} for row in self.blocks if row["reason"]]
        return {
            "title": self.title,
            "settings": settings,
            "before": before,
            "cost": "flops",
            "plans": plans,
            "initial": initial,
            "regions": self.regions,
            "rejections": refused,
            "nodes": self.nodes,
            "edges": self.edges,
            "blocks": self.blocks,
            "block_edges": self.block_edges,
            "islands": list(self.islands.values()),
        }

    def _plan(self, before: Row, index: int, indices: list[int]) -> Row:
        gone = sum(self.regions[i]["flops"] for i in indices)
        after = {"flops": before["flops"] - gone, "params": before["params"] - 100 * len(indices)}
        return {
            "budget": (index + 1) / 10,
            "removed": indices,
            "after": {**after, "blocks": before["blocks"] - len(indices)},
        }


def residual(stages: int = 2, depth: int = 3, *, title: str = "ResNet") -> Row:
    """Stages whose first block is a drop (its shortcut changes the shape) and whose others can be bypassed."""
    sketch = Sketch(title)
    last = sketch.block("conv1", ["Conv2d", "BatchNorm2d", "relu"], [-1], reason="it turns float32[N, 3] into another")
    for stage in range(1, stages + 1):
        name, entry = f"layer{stage}", last
        branch = sketch.block(f"{name}.0", ["Conv2d", "BatchNorm2d"], [entry])
        down = sketch.block(f"{name}.0.downsample", ["Conv2d"], [entry], reason="nothing can stand in for it")
        sketch.region(f"{name}.0", "drop", branch, 0.5 / stage, sketch.nodes[-1]["id"])
        last = sketch.block(f"{name}.add", ["add"], [branch, down], glue=True)
        for index in range(1, depth + 1):
            entered = sketch.blocks[last]["nodes"][-1]
            last = sketch.block(f"{name}.{index}", ["Conv2d", "BatchNorm2d", "relu"], [last])
            sketch.region(f"{name}.{index}", "bypass", last, 0.01 * index + 0.1 * stage, entered)
            sketch.region(
                f"{name}.{index}.bn", "bypass", last, 0.2 * index, sketch.blocks[last]["nodes"][0], slice(1, 2)
            )
    last = sketch.block("fc", ["flatten", "Linear"], [last], reason="it turns a map into a vector")
    sketch.block_edges.append([last, -2])
    return sketch.picture([[1], [1, 3], [0, 1, 3], [0, 1, 4]], 1)


def detector(*, title: str = "Detector", harm: str = "") -> Row:
    """A backbone with a pyramid and two heads: two islands, names as they come from the caller."""
    sketch = Sketch(title)
    body, levels = -1, []
    for stage in range(3):
        name = f"backbone.body.layer{stage}{harm}"
        body = sketch.block(f"{name}.conv", ["Conv2d"], [body], island="backbone", reason="it halves the map")
        entered = sketch.nodes[-1]["id"]
        body = sketch.block(name, ["Conv2d", "relu"], [body], island="backbone")
        sketch.region(name, "bypass", body, 1.0 + stage, entered)
        levels.append(body)
    top, outputs = -1, []
    for stage, level in reversed(list(enumerate(levels))):
        lateral = sketch.block(f"backbone.fpn.inner{stage}", ["Conv2d"], [level], island="backbone")
        if top >= 0:
            up = sketch.block(f"backbone.fpn.interpolate{stage}", ["interpolate"], [top], island="backbone", glue=True)
            lateral = sketch.block(f"backbone.fpn.add{stage}", ["add"], [lateral, up], island="backbone", glue=True)
        top = lateral
        outputs.append(sketch.block(f"backbone.fpn.layer{stage}", ["Conv2d"], [top], island="backbone"))
        sketch.region(f"backbone.fpn.layer{stage}", "bypass", outputs[-1], 5.0 + stage, sketch.blocks[top]["nodes"][-1])
    for head in ("classification", "regression"):
        last = sketch.block(f"head.{head}.0", ["Conv2d", "relu"], [], island=f"head.{head}")
        sketch.block_edges += [[output, last] for output in outputs]
        sketch.region(f"head.{head}.0", "bypass", last, 0.1 + len(head) / 100, -1)
        last = sketch.block(f"head.{head}.1", ["Conv2d"], [last], island=f"head.{head}", reason="it has the classes")
        sketch.block_edges.append([last, -2])
    return sketch.picture([[6], [0, 6]], None)


HARM = "</script><img src=x onerror=alert(1)>\"\\'#;[]{}|<b>&\n`-->日本\x01"
PICTURES = {
    "residual": residual(),
    "deep": residual(4, 5),
    "detector": detector(),
    "harm": detector(title=HARM, harm=HARM),
}
