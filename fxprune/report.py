"""What was removed, what stayed and why, before and after: as a value, and as a table."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from fxprune.detectors.choice import network_of
from fxprune.driver import plans_of
from fxprune.errors import ModelError
from fxprune.plan import Candidate, Plan, Totals
from fxprune.regions import Rejection


@dataclass(frozen=True)
class Report:
    """What fxprune did to a model.

    Attributes
    ----------
    before, after : Totals
        FLOPs per calibration image, parameters and blocks of the model as first given and as it is now.
    regions : tuple of Candidate
        Every candidate by ascending score, with `removed`.
    rejections : tuple of Rejection
        What could not go, and why.
    settings : mapping
        Criterion, images, targets, seed, versions; `budget` and `cost`; `prunings`, how many plans were applied.

    Examples
    --------
    >>> report = fxprune.report(pruned)                            # doctest: +SKIP
    >>> print(report)                                              # doctest: +SKIP
    >>> [region.name for region in report.regions if region.removed]  # doctest: +SKIP
    ['backbone.body.layer3.4']
    """

    before: Totals
    after: Totals
    regions: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    settings: Mapping[str, Any]

    @property
    def removed(self) -> tuple[Candidate, ...]:
        """The regions that went."""
        return tuple(region for region in self.regions if region.removed)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    def __str__(self) -> str:
        width = min(shutil.get_terminal_size((100, 24)).columns, 140)
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._summary()
        yield from self._tables(options.max_width)
        yield Text(self._sentence(), style="dim")

    def _summary(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("", "before", "after", "removed"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("FLOPs per image", *_change(self.before.flops, self.after.flops))
        table.add_row("parameters", *_change(self.before.params, self.after.params))
        blocks = (self.before.blocks, self.after.blocks)
        table.add_row("blocks", f"{blocks[0]}", f"{blocks[1]}", f"{blocks[0] - blocks[1]}")
        return table

    def _tables(self, width: int) -> Iterator[Table]:
        table = Table(title="Regions, least important first", title_justify="left", expand=False)
        table.add_column("", width=1)
        table.add_column("region", overflow="fold")
        table.add_column("kind")
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("FLOPs", justify="right", no_wrap=True)
        table.add_column("params", justify="right", no_wrap=True)
        for region in self.regions:
            mark, style = ("✂", "bold red") if region.removed else ("", "")
            share = f"{region.flops / self.before.flops:.1%}"
            table.add_row(
                mark, region.name, region.kind, f"{region.score:.3g}", share, quantity(region.params), style=style
            )
        yield table
        if self.rejections and width >= 60:
            reasons: dict[str, list[str]] = {}
            for rejection in self.rejections:
                reasons.setdefault(_kind_of(rejection.reason), []).append(rejection.name)
            refused = Table(title="Not removable", title_justify="left")
            refused.add_column("layers", overflow="fold", ratio=1)
            refused.add_column("why", overflow="fold", ratio=1)
            for reason, names in reasons.items():
                refused.add_row(_listed(names), reason)
            yield refused

    def _sentence(self) -> str:
        settings = self.settings
        return (
            f"✂ removed {len(self.removed)} of {len(self.regions)} candidates for a budget of {settings['budget']:.3g}"
            f" of {settings['cost']}, by {settings['criterion']} on {settings['images']} images"
            f" (targets: {settings['targets']}; seed {settings['seed']})"
        )


def report(pruned: nn.Module) -> Report:
    """Say what was removed from a model.

    Parameters
    ----------
    pruned : Module
        What `fxprune.compile` or `fxprune.apply` returned. If it was pruned more than once, the report adds up.

    Returns
    -------
    Report

    Raises
    ------
    ModelError
        If the model was not pruned by fxprune.

    Examples
    --------
    >>> print(fxprune.report(pruned))                              # doctest: +SKIP
    """
    plans = [Plan.from_dict(data) for data in plans_of(network_of(pruned))]
    if not plans:
        raise ModelError(f"{type(pruned).__name__} carries no fxprune plan: it was not pruned, or rebuilt since")
    last = plans[-1]
    regions = [*last.regions, *(region for plan in plans[:-1] for region in plan.removed)]
    settings = {**last.settings, "budget": last.budget, "cost": last.cost, "prunings": len(plans)}
    first = plans[0].before
    gone = sum(plan.before.blocks - plan.after.blocks for plan in plans)
    return Report(
        before=first,
        after=replace(last.after, blocks=first.blocks - gone),
        regions=tuple(sorted(regions, key=lambda region: region.score)),
        rejections=last.rejections,
        settings=settings,
    )


def quantity(value: float) -> str:
    """Write a count with an SI prefix: ``quantity(12_300_000) == "12.3M"``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:  # what rounds to 1000 of the smaller unit is 1 of this one
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.0f}"


def _change(before: float, after: float) -> tuple[str, str, str]:
    return quantity(before), quantity(after), f"{1 - after / before:.1%}"


def _kind_of(reason: str) -> str:
    return "it changes the shape" if reason.startswith("it turns") else reason


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
