"""How weights are moved: those that are matrices along orthogonal directions, the others one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

FEWEST = 16
"""Values an output from which on a weight is taken for a matrix: depthwise kernels, scales and shifts have fewer."""
ROWS = 128
"""Outputs that are made orthogonal together; those of wide layers in blocks, or it would take longer than passes."""
BETAS = 0.9, 0.99


class Optimizers:
    """Muon for matrices and AdamW for the rest, at one learning rate: `torch.optim.Muon` sees convolutions as matrices.

    Muon's steps are scaled to the size of AdamW's (Liu et al., "Muon is scalable for LLM training", 2025).

    Parameters
    ----------
    weights : sequence of Parameter
        Their memory becomes contiguous.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.wide = [weight for weight in weights if _is_matrix(weight)]
        for weight in self.wide:
            weight.data = weight.data.contiguous()
        blocks = [block for weight in self.wide for block in torch.split(weight.detach().flatten(1), ROWS)]
        self.matrices = [nn.Parameter(block) for block in blocks]  # the same memory
        others = [weight for weight in weights if not _is_matrix(weight)]
        self.parts: list[torch.optim.Optimizer] = []
        if self.matrices:
            self.parts += [torch.optim.Muon(self.matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        if others:
            self.parts += [torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0)]

    def step(self, learning_rate: float) -> None:
        """Move the weights by their gradients."""
        gradients = [block for weight in self.wide for block in torch.split(_gradient(weight).flatten(1), ROWS)]
        for matrix, gradient in zip(self.matrices, gradients, strict=True):
            matrix.grad = gradient
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__])


def _is_matrix(weight: nn.Parameter) -> bool:
    return weight.ndim > 1 and weight[0].numel() >= FEWEST


def _gradient(weight: nn.Parameter) -> torch.Tensor:
    """A weight's gradient, zeros where it got none."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
