"""Plans made by hand, with scores, names and reasons that no model of the tests would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from fxprune.graph.records import Region, Rejection
from fxprune.planning.plan import Candidate, Plan, Totals
from fxprune.planning.provenance import Provenance

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "`c`",
    "*d*",
    "[red]e[/red]",
    "f\ng",
    "__h__",
    "&amp;",
    '"><img src=x>',
    "backbone." * 20 + "end",
)


def block(name: str, score: float, removed: bool = False, **others: Any) -> Candidate:
    """A block that is one node of its own."""
    names = {field.name for field in fields(Region)}
    region = Region(name, "bypass", "", exit=name, stand_in="x", nodes=(name,), layers=(name,))
    region = replace(region, **{key: value for key, value in others.items() if key in names})
    values = {"score": score, "flops": 1e6, "params": 1000, "block": True, "removed": removed}
    return Candidate(region, **{**values, **{key: value for key, value in others.items() if key not in names}})


def plan_of(
    regions: Sequence[Candidate], reasons: Mapping[str, str] | None = None, settings: Mapping[str, Any] | None = None
) -> Plan:
    """A plan for a model of which these regions are all."""
    blocks, gone = [region for region in regions if region.block], [region for region in regions if region.removed]
    timed = "latency" in (settings or {})
    before = Totals(
        sum(one.flops for one in blocks),
        sum(one.params for one in blocks),
        len(blocks),
        sum(one.latency_ms or 0.0 for one in blocks) if timed else None,
    )
    after = Totals(
        before.flops - sum(one.flops for one in gone),
        before.params - sum(one.params for one in gone),
        before.blocks - sum(one.block for one in gone),
        None if before.latency_ms is None else before.latency_ms - sum(one.latency_ms or 0.0 for one in gone),
    )
    rejections = tuple(Rejection(name, reason) for name, reason in (reasons or {}).items())
    made = Provenance({"criterion": "fisher", **(settings or {})})
    return Plan(0.1, "flops", made, before, after, (), tuple(regions), rejections, nodes=(), links=())
