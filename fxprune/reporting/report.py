"""Reports of prunings: removed and remaining regions, rejections, and costs before and after."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn

from fxprune.adapters.registry import unwrap
from fxprune.graph.records import Rejection
from fxprune.planning.plan import Candidate, Plan, Totals
from fxprune.reporting.history_tables import Step, build_steps
from fxprune.reporting.html import render_html
from fxprune.reporting.measurement_tables import NextSteps, next_section, next_steps
from fxprune.reporting.sections import build_sections
from fxprune.reporting.table_model import Section, format_change
from fxprune.reporting.text import render_markdown, render_terminal
from fxprune.rewriting.history import SAVINGS_ATTRIBUTE, applied_plans


@dataclass(frozen=True)
class Report:
    """Report of the prunings of a model, or of a plan.

    `print` shows it as tables of the terminal's width; a notebook shows it as HTML.

    Attributes
    ----------
    plans : tuple of Plan
        The applied plans, oldest first, or the plan that is reported.
    applied : bool
        Whether the plans were applied; False for the report of a plan.
    spared : mapping of str to float
        ``flops`` and ``params`` saved by layers that read one tensor twice and were therefore made narrower.
    next_steps : tuple of (str, str)
        What to type next, and what for. It is shown in the terminal and in a notebook.

    Examples
    --------
    >>> report = fxprune.report(pruned)                            # doctest: +SKIP
    >>> print(report)                                              # doctest: +SKIP
    >>> Path("report.md").write_text(report.to_markdown())         # doctest: +SKIP
    >>> [region.name for region in report.regions if region.removed]  # doctest: +SKIP
    ['backbone.body.layer3.4']
    """

    plans: tuple[Plan, ...]
    applied: bool = True
    spared: Mapping[str, Any] = field(default_factory=dict)
    next_steps: NextSteps = ()

    @property
    def before(self) -> Totals:
        """FLOPs per calibration image, parameters and blocks of the original model."""
        return self.plans[0].before

    @property
    def after(self) -> Totals:
        """The same of the pruned model."""
        return self.steps[-1].after

    @property
    def steps(self) -> tuple[Step, ...]:
        """One step per plan: removed regions, totals after it, and increase of the loss."""
        *others, last = build_steps(self.plans)
        less = {name: getattr(last.after, name) - count for name, count in self.spared.items()}
        return (*others, replace(last, after=replace(last.after, **less)))

    @property
    def regions(self) -> tuple[Candidate, ...]:
        """All candidates by ascending score. Scores of different prunings cannot be compared."""
        *earlier, last = self.plans
        regions = [*last.regions, *(region for plan in earlier for region in plan.removed)]
        return tuple(sorted(regions, key=lambda region: region.score))

    @property
    def removed(self) -> tuple[Candidate, ...]:
        """The removed regions."""
        return tuple(region for region in self.regions if region.removed)

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """The layers and regions that cannot be removed, with reasons."""
        return self.plans[-1].rejections

    @property
    def settings(self) -> Mapping[str, Any]:
        """Criterion, images, targets, seed, versions, `budget` and `cost` of the last pruning.

        Also `prunings`, their number, and, if there is more than one, `earlier`: the settings of the others, each with
        `removed`, the names of the removed regions.
        """
        *others, last = self.plans
        earlier = [{**_settings(plan), "removed": [region.name for region in plan.removed]} for plan in others]
        return {**_settings(last), "prunings": len(self.plans), **({"earlier": earlier} if earlier else {})}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        data = {
            "applied": self.applied,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "steps": [asdict(step) for step in self.steps],
            "regions": [region.to_dict() for region in self.regions],
            "rejections": [asdict(rejection) for rejection in self.rejections],
            "settings": self.settings,
        }
        plain: dict[str, Any] = json.loads(json.dumps(data))
        return plain

    def to_markdown(self) -> str:
        """Return the report as Markdown, for a model card or a pull request."""
        return render_markdown(self._sections())

    def __repr__(self) -> str:
        flops = format_change(self.before.flops, self.after.flops)
        return f"<Report: {len(self.removed)} of {len(self.regions)} candidates, {flops} FLOPs; print it to see more>"

    def __str__(self) -> str:
        width = shutil.get_terminal_size((100, 24)).columns
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from render_terminal(self._sections_and_next(), options.max_width)

    def _repr_html_(self) -> str:
        return render_html(self._sections_and_next())

    def _sections_and_next(self) -> tuple[Section, ...]:
        return (*self._sections(), *([next_section(self.next_steps)] if self.next_steps else []))

    def _sections(self) -> tuple[Section, ...]:
        return build_sections(self.plans, self.applied, self.before, self.after)


def report(pruned: nn.Module | Plan) -> Report:
    """Report which regions were removed from a model, or which ones a plan removes.

    Parameters
    ----------
    pruned : Module or Plan
        Output of `fxprune.compile` or `fxprune.apply`, or a plan. If the model was pruned more than once, the report
        covers all prunings.

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
    >>> print(fxprune.report(analysis.plan(budget=0.2)))           # doctest: +SKIP
    """
    if isinstance(pruned, Plan):
        return Report((pruned,), applied=False, next_steps=next_steps(pruned, False, False))
    plans, network = applied_plans(pruned), unwrap(pruned)
    steps = next_steps(plans[-1], True, network is not pruned)
    return Report(plans, spared=getattr(network, SAVINGS_ATTRIBUTE, {}), next_steps=steps)


def _settings(plan: Plan) -> dict[str, Any]:
    return {**plan.settings, "budget": plan.budget, "cost": plan.cost}
