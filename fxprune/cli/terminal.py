"""Results on stdout, everything else on stderr; progress bars with rates."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from fxprune.runtime.json_text import replace_nonfinite

Tell = Callable[[str, int, int | None], None]
"""Type of `progress` in `fxprune.analyze`: ``tell(stage, done, total)``; `total` is None if it is not known."""
STAGE_UNITS = {"capture": "steps", "stand-ins": "batches", "compile": "regions", "latency": "rounds"}
STAGE_UNITS |= {"search": "plans", "affine": "layers", "mimic": "steps"}
"""The unit of a stage's count, if it is not images."""


@dataclass(frozen=True)
class Result:
    """The result of a command: plain data for JSON, a view for the terminal, and a remark for stderr."""

    data: Any
    view: RenderableType | None
    remark: str = ""


@dataclass(frozen=True)
class Terminal:
    """The consoles: `out` for results, `err` for everything else."""

    out: Console
    err: Console

    @contextmanager
    def progress(self) -> Iterator[Tell]:
        """Show one progress bar per stage; show nothing if stderr is not a terminal."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            _RateColumn(),
        )
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as bars:
            stages: dict[str, _Stage] = {}

            def tell(name: str, done: int, total: int | None) -> None:
                if name not in stages:
                    for other in stages.values():
                        other.end()
                    stages[name] = _Stage(bars, bars.add_task(name, total=None))
                stages[name].tell(done, total)

            yield tell

    def show(self, result: Result, as_json: bool) -> None:
        """Print a result, and its remark."""
        if as_json:
            self.out.file.write(to_json(result.data))
        elif result.view is not None:
            self.out.print(result.view)
        self.out.file.flush()
        if result.remark:
            self.say(result.remark)

    def say(self, text: str, style: str = "", head: str = "fxprune:") -> None:
        """Print a remark or an error as one paragraph on stderr."""
        self.err.print(Text.assemble((head, style), " ", text), soft_wrap=not self.err.is_terminal)


@dataclass
class _Stage:
    """The progress bar of a stage. If the stage runs several times, the bar counts all runs together."""

    bars: Progress
    task: TaskID
    done: int = 0
    before: int = 0
    endless: bool = True

    def tell(self, done: int, total: int | None) -> None:
        """Update the bar; if `done` is less than before, the stage has started again."""
        if done < self.done:
            self.before += self.done
        self.done = done
        whole = None if total is None else self.before + total
        self.endless = whole is None
        self.bars.update(self.task, completed=self.before + done, total=None if (done, whole) == (0, 1) else whole)

    def end(self) -> None:
        """Fill the bar if its total is not known; called when the next stage starts."""
        if self.endless:
            self.bars.update(self.task, total=self.done)


def open_terminal() -> Terminal:
    """Open the current stdout and stderr; characters that stdout cannot encode become question marks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Terminal(_ResultConsole(file=sys.stdout), Console(stderr=True, file=sys.stderr))


def to_json(data: Any) -> str:
    """Return plain data as strict JSON text; NaN and infinity become null."""
    return json.dumps(replace_nonfinite(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


class _ResultConsole(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error for `fxprune.cli.runner`; rich would end the process with status 1."""
        raise


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Return the count, the total and the mean rate; empty for a stage of one step."""
        if task.total is None or task.total <= 1:
            return Text("")
        seconds, unit = task.finished_time or task.elapsed, STAGE_UNITS.get(task.description.split()[0], "img")
        rate = task.completed / seconds if seconds else 0.0
        pace = f", {rate:.3g} {unit}/s" if rate >= 1 else f", {1 / rate:.3g} s each" if rate else ""
        return Text(f"{task.completed:g}/{task.total:g} {unit}{pace}", style="progress.data.speed")
