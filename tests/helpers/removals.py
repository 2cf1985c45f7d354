"""Plans that remove named regions, whatever their scores."""

from __future__ import annotations

from dataclasses import replace

from fxprune.planning.analysis import Analysis
from fxprune.planning.plan import Plan


def plan_for(analysis: Analysis, names: set[str]) -> Plan:
    """A plan that removes just the named regions."""
    regions = tuple(replace(region, removed=region.name in names) for region in analysis.regions)
    return Plan(
        budget=0.5,
        cost="flops",
        settings=analysis.settings,
        before=analysis.before,
        after=analysis.before,
        islands=analysis.islands,
        regions=regions,
        rejections=analysis.rejections,
        nodes=(),
        links=(),
    )
