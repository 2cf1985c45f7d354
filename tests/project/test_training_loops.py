"""Training loops of others keep the pruned structure, in their checkpoints too, and go on from these."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fxprune
from tests.helpers.paths import ROOT
from tests.helpers.training import Run, batches, build_detector, kept, prune_detector, resume


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned detector that was saved."""
    place = tmp_path_factory.mktemp("training")
    fxprune.save(prune_detector(build_detector()), place / "pruned")
    return place


def load(folder: Path, name: str = "pruned") -> nn.Module:
    return fxprune.load(build_detector(seed=3), folder / name)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    assert kept(first) == kept(second)
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def resume_in_a_fresh_process(folder: Path) -> None:
    code = "import sys, pathlib; from tests.helpers.training import resume; resume(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=ROOT)


@pytest.mark.parametrize("again", [resume, pytest.param(resume_in_a_fresh_process, marks=pytest.mark.slow)])
def test_torchvision_loop_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(again: Any, folder: Path) -> None:
    run = Run(load(folder))
    before = kept(run.model)
    run.train((0, 1))
    run.save(folder / "checkpoint.pt")
    run.train((2, 3))
    assert kept(run.model) == kept(run.average.module) == before
    again(folder)
    assert_equal(load(folder, "model"), run.model)
    assert_equal(load(folder, "average"), run.average.module)
    assert not torch.equal(run.model.state_dict()["backbone.0.weight"], load(folder).state_dict()["backbone.0.weight"])
    assert "removed 2 of" in str(fxprune.report(run.average.module))


def test_accelerate_restores_a_pruned_model_from_its_state(folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason='pip install "fxprune[huggingface]"')
    accelerator = accelerate.Accelerator(cpu=True)

    def prepare() -> Any:
        model = load(folder).train()
        return accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9))

    def step(model: Any, optimizer: Any, index: int) -> None:
        accelerator.backward(sum(model(*batches()[index]).values()))
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = prepare()
    step(model, optimizer, 0)
    accelerator.save_state(folder / "state")
    step(model, optimizer, 1)
    accelerator.free_memory()
    again, optimizer = prepare()
    accelerator.load_state(folder / "state")
    step(again, optimizer, 1)
    assert_equal(accelerator.unwrap_model(again), accelerator.unwrap_model(model))
    assert kept(accelerator.unwrap_model(again)) == kept(load(folder))


@pytest.mark.slow
def test_lightning_loads_and_resumes_its_checkpoints(folder: Path, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="pip install lightning")

    class Detector(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, place: str) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = load(Path(place)).train()

        def training_step(self, batch: Any, _: int) -> Any:
            return sum(self.net(*batch).values())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def fit(steps: int, **arguments: Any) -> tuple[Any, Path]:
        saver = lightning.callbacks.ModelCheckpoint(tmp_path, f"after-{steps}", every_n_train_steps=steps)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", callbacks=[saver], **quiet)
        module = Detector(str(folder))
        epoch: Any = batches()[:2]  # a checkpoint within an epoch would repeat its first batches
        trainer.fit(module, DataLoader(epoch, batch_size=None), **arguments)
        return module, Path(saver.best_model_path)

    two, checkpoint = fit(2)
    assert kept(two.net) == kept(load(folder))
    assert_equal(Detector.load_from_checkpoint(checkpoint).net, two.net)
    resumed, _ = fit(4, ckpt_path=checkpoint)
    assert_equal(resumed.net, fit(4)[0].net)
    fxprune.save(resumed.net, tmp_path / "tuned")
    assert_equal(load(tmp_path, "tuned"), resumed.net)
