"""The files under ``benchmarks/results/``: one JSON object a line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def machine(device: str = "cpu") -> str:
    """What the figures were measured on."""
    version = torch.__version__.split("+")[0]
    kind = platform.processor() or platform.machine()
    said = f"{os.cpu_count()} cores, {kind}, torch {version}, {torch.get_num_threads()} thread(s)"
    return f"{said}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else said


def read_rows(name: str) -> list[Row]:
    """All rows of ``results/<name>.jsonl``; none if it is not there."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def replace_rows(name: str, model: str, rows: Iterable[Row]) -> None:
    """Write the rows of one model in place of those that are there."""
    kept = [row for row in read_rows(name) if row["model"] != model]
    write_all(name, [*kept, *rows])


def append_row(name: str, row: Row) -> None:
    """Add a row to a file; several programs may do so at a time."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_all(name: str, rows: Iterable[Row]) -> None:
    """Write a file anew."""
    RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (RESULTS / f"{name}.jsonl").write_text(text, encoding="utf-8")
