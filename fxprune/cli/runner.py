"""Runs a command: gathers its options, shows its result, and turns errors into one paragraph and an exit status."""

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
EXIT_STATUS = {0: "success", EXIT_FAILED: "failure", EXIT_USAGE: "wrong usage", EXIT_INTERRUPTED: "Ctrl-C"}
"""The meaning of each exit status. It is 0 too if the reader of a pipe closes it early."""

Command = Callable[..., Result | None]


def typer_command(command: Command) -> Callable[..., None]:
    """Make a function for `typer` from a command that takes groups of options and returns a `Result`.

    Parameters
    ----------
    command : callable
        A parameter of type `Terminal` gets the terminal; the others are groups of options or single options. Text
        that the command prints goes to stderr; only its result goes to stdout.
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
    """Keep the stdout of the process for Python: the output of C libraries such as HiGHS goes to stderr."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        return
    sys.stdout = open(kept, "w", encoding=sys.stdout.encoding)  # noqa: SIM115


@contextlib.contextmanager
def report_errors(terminal: Terminal, debug: bool) -> Iterator[None]:
    """Turn errors into a paragraph on stderr and `typer.Exit`.

    Warnings of fxprune become remarks; other warnings are hidden.

    Parameters
    ----------
    terminal : Terminal
        The terminal to write to.
    debug : bool
        Whether to print tracebacks and all warnings.
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
    """Discard the output that could not be written to stdout; otherwise Python would try again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.out.file.fileno())


def describe_error(error: Exception) -> str:
    """Describe an error in one paragraph.

    Examples
    --------
    >>> describe_error(FileNotFoundError(2, "No such file or directory", "plan.json"))
    'plan.json: No such file or directory'
    """
    if isinstance(error, FxpruneError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'stdout'}: {error.strerror}"
    message = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}{f': {message}' if message else ''}. --debug shows the traceback"


def _make_showwarning(terminal: Terminal) -> Callable[..., None]:
    return lambda message, *_, **__: terminal.say(str(message), "yellow", "note:")


def version_line() -> str:
    """Name the versions of fxprune and torch, and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return f"fxprune {__version__}, torch {torch.__version__}, {device}"


def _processor() -> str:
    name = "Apple GPU" if torch.backends.mps.is_available() else f"CPU {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, {torch.get_num_threads()} threads"
