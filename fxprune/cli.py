"""The command line. ``fxprune demo`` does the whole job on the bundled detector."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from fxprune.criteria import CRITERIA
from fxprune.demo import DEMO_CRITERIA, run_demo
from fxprune.errors import FxpruneError
from fxprune.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands and their options."""
    parser = argparse.ArgumentParser(
        prog="fxprune", description="Find the blocks a detector does not need, and remove them."
    )
    parser.add_argument("--version", action="version", version=f"fxprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="prune the bundled trained detector and show what it keeps")
    demo.add_argument("--budget", type=float, default=0.1, help="fraction of FLOPs to remove (default: %(default)s)")
    demo.add_argument(
        "--criterion",
        action="append",
        choices=sorted(CRITERIA),
        help=f"may be given more than once (default: {', '.join(DEMO_CRITERIA)})",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Examples
    --------
    >>> main(["demo", "--budget", "0.2", "--criterion", "fisher"])   # doctest: +SKIP
    0
    """
    options = build_parser().parse_args(argv)
    errors = Console(stderr=True)
    try:
        run_demo(Console(), errors, options.budget, tuple(options.criterion or DEMO_CRITERIA))
    except FxpruneError as error:
        errors.print(f"[bold red]fxprune:[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130
    return 0
