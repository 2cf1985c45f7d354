"""The options and result files of benchmarks that measure systems of `tests.helpers.systems`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.results import RESULTS, describe_machine
from tests.helpers.systems import MORE, SIX, Sizes, System


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose systems, sizes and threads."""
    known = [system.name for system in (*SIX, *MORE)]
    parser.add_argument("--systems", nargs="+", choices=known, metavar="NAME", help="only these")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def choose_systems(options: argparse.Namespace, everything: bool = False) -> list[System]:
    """Choose the systems named in `options`; without names the six, or all with `everything`."""
    if options.systems:
        return [system for system in (*SIX, *MORE) if system.name in options.systems]
    return [*SIX, *(MORE if everything else ())]


def read_sizes(options: argparse.Namespace) -> Sizes:
    """Read the sizes from the options."""
    return Sizes(**{name: getattr(options, name) for name in vars(Sizes())})


def write_rows(name: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows to ``results/<name>.jsonl`` one by one, in place of the rows of the last run; returns them."""
    RESULTS.mkdir(exist_ok=True)
    written = []
    with (RESULTS / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            written.append(row | {"machine": describe_machine()})
            file.write(json.dumps(written[-1]) + "\n")
            file.flush()
    return written
