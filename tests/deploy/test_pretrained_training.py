"""Trainer, accelerate and pipelines keep the plan of a pruned model of transformers, or refuse the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='pip install "fxprune[huggingface]"')
pytest.importorskip("accelerate", reason='pip install "fxprune[huggingface]"')

import accelerate
import transformers
from PIL import Image

import fxprune
from tests.helpers.pretrained import REMOVED, SmallPreTrained, batches, build_small, prune

DATA = [
    {"pixel_values": image, "labels": label}
    for batch in batches()
    for image, label in zip(batch["pixel_values"], batch["labels"], strict=True)
]


@pytest.fixture(scope="module")
def pruned() -> Any:
    return prune(build_small(), REMOVED)


def make_trainer(model: Any, folder: Path, steps: int, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA)


def assert_equal(first: Any, second: Any) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_trainer_resumes_a_pruned_model_as_if_it_had_not_stopped(pruned: Any, tmp_path: Path) -> None:
    whole = make_trainer(copy.deepcopy(pruned), tmp_path / "whole", 4)
    whole.train()
    first = make_trainer(copy.deepcopy(pruned), tmp_path / "parts", 4)
    first.train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"fxprune\.from_pretrained"):
        SmallPreTrained.from_pretrained(checkpoint)
    second = make_trainer(fxprune.from_pretrained(SmallPreTrained, checkpoint), tmp_path / "parts", 4)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(second.model, whole.model)
    second.save_model(str(tmp_path / "final"))
    final = fxprune.from_pretrained(SmallPreTrained, tmp_path / "final")
    assert_equal(final, second.model)
    assert fxprune.report(final) == fxprune.report(pruned)


def test_trainer_gives_the_best_checkpoint_to_the_pruned_model(pruned: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 3.0}
    trainer = make_trainer(copy.deepcopy(pruned), tmp_path, 6, load_best_model_at_end=True, **settings)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert_equal(trainer.model, fxprune.from_pretrained(SmallPreTrained, best))
    others = set(tmp_path.glob("checkpoint-*")) - {Path(best)}
    assert others
    for other in others:
        differing = fxprune.from_pretrained(SmallPreTrained, other).state_dict()
        assert not torch.equal(differing["fc.weight"], trainer.model.fc.weight)


def test_accelerate_saves_what_it_unwraps_with_the_plan(pruned: Any, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(copy.deepcopy(pruned))
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert_equal(fxprune.from_pretrained(SmallPreTrained, tmp_path), pruned)


def test_pipeline_refuses_a_pruned_folder_and_takes_a_pruned_model(pruned: Any, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fxprune\.from_pretrained"):
        transformers.pipeline("image-classification", model=str(tmp_path))

    model = fxprune.from_pretrained(SmallPreTrained, tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    assert len(classify(Image.new("RGB", (20, 20)), top_k=5)) == 5
