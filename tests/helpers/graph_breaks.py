"""A model with code that Dynamo cannot capture, and a plan for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from fxprune.deploy.dynamo_backend import fxprune_backend
from fxprune.planning.plan import Plan
from tests.helpers.models import labelled, tiny
from tests.helpers.removals import plan_for

unseen: Any = torch._dynamo.disable


def compiled_by(model: nn.Module, plan: Plan | Path, inner: Any = "eager", **settings: Any) -> Any:
    options = {"plan": plan, "inner": inner}
    return torch.compile(model, backend=fxprune_backend, options=options, **settings)


class Broken(nn.Module):
    """Two blocks; `where` says which code Dynamo does not see."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.blocks = tiny().get_submodule("blocks")
        self.stem = nn.Conv2d(3, 8, 1)
        if where == "inside":
            block = self.blocks[0]  # type: ignore[index]
            norm = block.norm
            norm.forward = unseen(norm.forward)
        elif where == "around":
            self.blocks.forward = unseen(self.blocks.forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


def broken_plan() -> Plan:
    return plan_for(fxprune.analyze(Broken("").eval(), labelled()), {"blocks.0"})
