"""The installed command as a process: pipes, signals, full disks, a clean stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

COMMAND = [str(Path(sys.executable).parent / "fxprune")]
OWN = """\
import ctypes
import fxprune.demo.bundled

def build():
    ctypes.CDLL(None).puts(b"said in C")
    print("built", flush=True)
    ctypes.CDLL(None).fflush(None)
    return fxprune.demo.bundled.load_detector()
"""


def test_closed_pipe_ends_quietly() -> None:
    process = subprocess.Popen(
        [*COMMAND, "eval", "bundled", "--limit", "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.slow
def test_full_disk_behind_stdout_is_reported() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [*COMMAND, "eval", "bundled", "--limit", "4", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "stdout: No space left" in line


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_analysis_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    images = ROOT / "fxprune" / "demo" / "data" / "calibration" / "images"
    process = subprocess.Popen(
        [*COMMAND, "prune", "mine:build", "--images", str(images), "--out", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stderr is not None
    assert sorted([process.stderr.readline(), process.stderr.readline()]) == ["built\n", "said in C\n"]
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert (out, err) == ("", "fxprune: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


def test_output_of_c_code_does_not_go_to_stdout(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    images = ROOT / "fxprune" / "demo" / "data" / "calibration" / "images"
    command = [
        *COMMAND,
        "analyze",
        "mine:build",
        "--images",
        str(images),
        "--limit",
        "2",
        "--criterion",
        "l1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["settings"]["images"] == 2
    assert {"built", "said in C"} <= set(done.stderr.splitlines())


def test_stdout_is_one_document_with_verbose_ultralytics(tmp_path: Path) -> None:
    images = ROOT / "fxprune" / "demo" / "data" / "calibration" / "images"
    environment = os.environ | {"YOLO_VERBOSE": "true", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*COMMAND, "analyze", "ultralytics:yolov8n.yaml", "--images", str(images), "--limit", "2", "--size", "64",
         "--criterion", "l1", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["fxprune_plan"] == 4
    assert plan["settings"]["targets"] == "the model's own confident outputs"


@pytest.mark.slow
def test_completion_lists_commands_and_names() -> None:
    for words, count, expected in (("fxprune an", 1, "analyze"), ("fxprune eval bun", 2, "bundled")):
        environment = os.environ | {"_FXPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment, check=False)
        assert done.stdout.split() == [expected]
