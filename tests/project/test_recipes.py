"""The README's recipes for saving, compiling and exporting run and give the outputs of the pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxprune
from tests.helpers.models import labelled, pixels, tiny
from tests.helpers.readme import README, blocks_under

HEADING = "## Saved, loaded, compiled"
PROMISED = ("fxprune.save(", "fxprune.load(", "torch.compile(", "fxprune.pruning_backend(", 'backend="fxprune"')
"""What the recipes show."""

Run = Callable[[Tensor], Tensor]


BLOCKS = blocks_under(HEADING, README.read_text(encoding="utf-8"))


def runnable(names: dict[str, Any], folder: Path) -> dict[str, Run]:
    """Everything that takes images and gives logits: models and programs by name, exported files by path."""
    found: dict[str, Run] = {}
    for name, value in names.items():
        if isinstance(value, nn.Module):
            found[name] = value
        elif isinstance(value, ExportedProgram):
            found[name] = value.module()
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".pt2":
            found[str(file)] = torch.export.load(file).module()
        elif file.suffix == ".onnx":
            found[str(file)] = by_onnxruntime(file)
    return found


def by_onnxruntime(file: Path) -> Run:
    session = pytest.importorskip("onnxruntime", reason="pip install onnxruntime").InferenceSession(str(file))

    def run(x: Tensor) -> Tensor:
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(found)

    return run


def plans_in(names: dict[str, Any], folder: Path) -> Iterator[fxprune.Plan]:
    yield from (value for value in names.values() if isinstance(value, fxprune.Plan))
    yield from (fxprune.Plan.load(file) for file in folder.glob("*.json"))


def alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the section takes for granted: a model and images, a pruned model, a plan on file."""
    monkeypatch.chdir(tmp_path)
    model, loader, images = tiny(), labelled(), pixels(2, 3, 16, 16, seed=9)
    plan = fxprune.analyze(model, loader).plan(0.2)
    plan.save("plan.json")
    return {
        "fxprune": fxprune,
        "torch": torch,
        "model": model,
        "build_model": tiny,
        "calib_loader": loader,
        "images": images,
        "x": images,
        "pruned": fxprune.apply(model, plan),
    }


def test_readme_section_shows_all_promised_recipes() -> None:
    assert [text for text in PROMISED if not any(text in block for block in BLOCKS)] == []


@torch.no_grad()
def test_readme_recipes_give_the_outputs_of_the_pruned_model(started: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    names, images, unpruned = dict(started), started["images"], started["model"](started["images"])
    known = set(runnable(names, tmp_path))
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
        everything = runnable(names, tmp_path)
        expected = [fxprune.apply(started["model"], plan)(images) for plan in plans_in(names, tmp_path)]
        expected.append(names["pruned"](images))
        made = {name: run for name, run in everything.items() if name not in known}
        assert made, f"nothing that runs came of\n{block}"
        for name, run in made.items():
            found = run(images)
            assert any(alike(found, output) for output in expected), f"{name} of\n{block}"
            assert not alike(found, unpruned), f"{name} is not pruned, of\n{block}"
        known |= set(made)
    torch._dynamo.reset()
