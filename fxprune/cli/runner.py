"""Running a command: its options gathered, its result shown, its errors told in one paragraph and an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import typer

from fxprune.cli.options import gather_arguments, spread_signature
from fxprune.cli.terminal import Result, Terminal, open_terminal
from fxprune.errors import FxpruneError, FxpruneWarning
from fxprune.version import __version__

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EXIT_STATUS = {0: "fine", EXIT_FAILED: "it failed", EXIT_USAGE: "wrong usage", EXIT_INTERRUPTED: "Ctrl-C"}
"""What the exit statuses mean. A reader that closes the pipe early is fine."""

Command = Callable[..., Result | None]


def typer_command(command: Command) -> Callable[..., None]:
    """Make what `typer` calls of a command that takes groups of options and returns a `Result`.

    Parameters
    ----------
    command : callable
        A parameter of type `Terminal` gets the terminal; the others are groups of options or single ones. It may print
        to stdout: that goes to stderr, and only its result to stdout.
    """

    def run(**values: Any) -> None:
        terminal = open_terminal()
        with report_errors(terminal, values["debug"]):
            with contextlib.redirect_stdout(sys.stderr):
                result = command(**gather_arguments(command, values, {Terminal: terminal}))
            if result is not None:
                terminal.show(result, values["json"])
            terminal.out.file.flush()

    run.__doc__, run.__name__, run.__annotations__ = command.__doc__, command.__name__, {}
    run.__signature__ = spread_signature(command, [Terminal])  # type: ignore[attr-defined]
    return run


def keep_stdout() -> None:
    """Keep this process's stdout for Python: what libraries in C print there (HiGHS does) now goes to stderr."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        return
    sys.stdout = open(kept, "w", encoding=sys.stdout.encoding)  # noqa: SIM115


@contextlib.contextmanager
def report_errors(terminal: Terminal, debug: bool) -> Iterator[None]:
    """Turn errors into a paragraph on stderr and `typer.Exit`; warnings of fxprune into remarks, others into nothing.

    Parameters
    ----------
    terminal : Terminal
        Where to.
    debug : bool
        Whether to print tracebacks, and every warning.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if debug else "ignore")
            if not debug:
                warnings.simplefilter("always", FxpruneWarning)
                warnings.showwarning = _make_showwarning(terminal)
            yield
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        terminal.say("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        _drop_output(terminal)
        raise typer.Exit(0) from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:
            _drop_output(terminal)
        if debug:
            terminal.err.print_exception()
        terminal.say(describe_error(error), "bold red")
        raise typer.Exit(EXIT_FAILED) from error


def _drop_output(terminal: Terminal) -> None:
    """Let go of what stdout did not take, or Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.out.file.fileno())


def describe_error(error: Exception) -> str:
    """Say what happened in one paragraph.

    Examples
    --------
    >>> describe_error(FileNotFoundError(2, "No such file or directory", "plan.json"))
    'plan.json: No such file or directory'
    """
    if isinstance(error, FxpruneError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'stdout'}: {error.strerror}"
    said = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}{f': {said}' if said else ''}. --debug shows where"


def _make_showwarning(terminal: Terminal) -> Callable[..., None]:
    return lambda message, *_, **__: terminal.say(str(message), "yellow", "note:")


def version_line() -> str:
    """Name the versions of fxprune and torch, and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"fxprune {__version__}, torch {torch.__version__}, {device}"


def _processor() -> str:
    name = "Apple GPU" if torch.backends.mps.is_available() else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, {torch.get_num_threads()} threads"
