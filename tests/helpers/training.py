"""A small torchvision detector, pruned, and a training loop as in torchvision's references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import fxprune
from fxprune.rewriting.history import take_inventory
from fxprune.rewriting.pruned_module import PrunedModule
from tests.helpers.batches import boxed
from tests.helpers.models import Block, Waves
from tests.helpers.removals import plan_for

REMOVED = {"backbone.2", "backbone.3.first"}
"""Paths of what `prune_detector` removes: a block, and a layer within a module that becomes a graph."""


def build_detector(seed: int = 0) -> RetinaNet:
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1)]
    backbone = nn.Sequential(*stem, Block(8), Waves(8), Block(8))
    backbone.out_channels = 8  # type: ignore[assignment]
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    return RetinaNet(backbone, 3, min_size=64, max_size=64, anchor_generator=anchors, detections_per_img=5).eval()


def batches() -> list[tuple[list[Tensor], list[dict[str, Any]]]]:
    torch.manual_seed(1)
    return [boxed(64, 64) for _ in range(4)]


def prune_detector(model: nn.Module) -> nn.Module:
    """Remove the parts in `REMOVED`."""
    pruned = fxprune.apply(model, plan_for(fxprune.analyze(model, batches()[:1], criterion="l1"), REMOVED))
    assert isinstance(pruned.get_submodule("backbone.3"), PrunedModule)
    assert type(pruned.get_submodule("backbone.2")) is nn.Identity
    return pruned


def kept(model: nn.Module) -> dict[str, str]:
    """The structure of a model, in words."""
    return take_inventory(model)


class Run:
    """SGD with momentum and a warm-up, and a moving average of the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.scheduler = LinearLR(self.optimizer, 0.1, total_iters=3)
        average: Any = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.parts = {name: vars(self)[name] for name in ("model", "optimizer", "scheduler", "average")}

    def train(self, steps: Sequence[int]) -> None:
        """Train on the batches of these numbers."""
        data = batches()
        for step in steps:
            images, targets = data[step]
            loss = sum(self.model(images, targets).values())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.average.update_parameters(self.model)

    def save(self, file: Path) -> None:
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, file)

    def load(self, file: Path) -> None:
        for name, state in torch.load(file).items():
            self.parts[name].load_state_dict(state)


def resume(folder: Path) -> None:
    """Load the pruned detector and a checkpoint of two steps, train two more, and save model and average."""
    run = Run(fxprune.load(build_detector(seed=7), folder / "pruned"))
    run.load(folder / "checkpoint.pt")
    run.train((2, 3))
    for name, model in (("model", run.model), ("average", run.average.module)):
        fxprune.save(model, folder / name, overwrite=True)
