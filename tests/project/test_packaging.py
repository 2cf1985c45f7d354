"""The wheel holds all modules and data, and the public names are those documented."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import fxprune
import fxprune.errors
from tests.helpers.paths import ROOT


def test_wheel_holds_every_module_and_the_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fxprune").rglob("*.py")}
    tree |= {f"fxprune/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "passes").rglob("*.py")}
    for folder in ("demo/data", "visualize/web"):
        tree |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fxprune" / folder).rglob("*") if path.is_file()}
    tree.add("fxprune/py.typed")
    assert {name for name in tree if "__pycache__" not in name} <= packed
    assert not any(name.startswith(("passes/", "tests/", "benchmarks/")) for name in packed)


def test_public_names_are_those_documented() -> None:
    own = [value for value in vars(fxprune.errors).values() if getattr(value, "__module__", "") == "fxprune.errors"]
    errors = {value.__name__ for value in own if isinstance(value, type)}
    data = {"CocoDataset", "ImageFolder", "YoloDataset", "agreement", "batches", "draw", "evaluate", "fold_norms"}
    data |= {"from_pretrained", "heal", "load", "save", "trainer"}
    values = {"Agreement", "Analysis", "Candidate", "Plan", "Rejection", "Report"}
    steps = {"analyze", "apply", "compile", "report", "pruning_backend"}
    assert set(fxprune.__all__) == errors | data | values | steps | {"__version__"}
    assert dir(fxprune) == sorted(fxprune.__all__)
    for name in errors - {"FxpruneWarning"}:
        assert issubclass(getattr(fxprune, name), fxprune.FxpruneError)


def test_import_loads_no_optional_package_no_dataset_and_no_renderer() -> None:
    late = {"ultralytics", "transformers", "huggingface_hub", "pycocotools", "quickjs", "resvg_py"}
    code = f"import fxprune, sys; assert not {late} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
