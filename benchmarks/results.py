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


def describe_machine(device: str = "cpu") -> str:
    """Describe the machine: cores, processor, torch's version and threads, and the GPU if `device` is one."""
    version = torch.__version__.split("+")[0]
    kind = platform.processor() or platform.machine()
    said = f"{os.cpu_count()} cores, {kind}, torch {version}, {torch.get_num_threads()} thread(s)"
    return f"{said}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else said


def read_rows(name: str) -> list[Row]:
    """Read all rows of ``results/<name>.jsonl``; an empty list if there is no such file."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def replace_rows(name: str, model: str, rows: Iterable[Row]) -> None:
    """Replace the rows of one model."""
    kept = [row for row in read_rows(name) if row["model"] != model]
    write_all(name, [*kept, *rows])


def append_row(name: str, row: Row) -> None:
    """Append a row to a file. Several processes may append at once."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_all(name: str, rows: Iterable[Row]) -> None:
    """Overwrite a file."""
    RESULTS.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (RESULTS / f"{name}.jsonl").write_text(text, encoding="utf-8")
