"""How weights are moved: those that are matrices along orthogonal directions, the others one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MIN_MATRIX_INPUTS = 16
"""Values an output from which on a weight is taken for a matrix: depthwise kernels, scales and shifts have fewer."""
BLOCK_ROWS = 128
"""Outputs that are made orthogonal together; those of wide layers in blocks, or it would take longer than passes."""
BETAS = 0.9, 0.99
MOMENTUM = 0.95
NEWTON_SCHULZ_COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Coefficients of a Newton-Schulz iteration (Jordan et al., 2024), those of `torch.optim.Muon` as is its momentum."""
NEWTON_SCHULZ_ITERATIONS = 5


class MuonAdamW:
    """Muon for matrices and AdamW for the rest, at one learning rate."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        matrices = [weight for weight in weights if _is_matrix(weight)]
        others = [weight for weight in weights if not _is_matrix(weight)]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers += [Muon(matrices)]
        if others:
            self.optimizers += [torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0)]

    def step(self, learning_rate: float) -> None:
        """Move the weights by their gradients; one without moves as if it had zeros."""
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for part in self.optimizers:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) of convolutions too, its steps of AdamW's size (Liu et al., arXiv 2502.16982).

    `torch.optim.Muon` takes matrices alone and multiplies them in bfloat16: what differs in the last bits of float32,
    as gradients of other numbers of processes do, differs by a hundredth there. Here float32 stays float32, and is
    faster still, for it iterates on the square of each matrix.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the weights by their gradients, blocks of `BLOCK_ROWS` outputs each along orthogonal directions."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                blocks = torch.split(torch.lerp(weight.grad, momentum, MOMENTUM).flatten(1), BLOCK_ROWS)
                moves = [0.2 * max(block.shape) ** 0.5 * newton_schulz(block) for block in blocks]
                weight.add_(torch.cat(moves).view_as(weight), alpha=-group["lr"])


def newton_schulz(matrix: Tensor) -> Tensor:
    """The nearest matrix of orthogonal rows (or columns, if those are fewer), up to singular values of about .7 to 1.2.

    Each Newton-Schulz iteration multiplies ``X`` by a polynomial of ``X @ X.T``. Those commute, so the product of the
    polynomials is found from the small square first, and the matrix is multiplied once.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    once, twice, thrice = NEWTON_SCHULZ_COEFFICIENTS
    square, product = wide @ wide.T, torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    for _ in range(NEWTON_SCHULZ_ITERATIONS):
        factor = torch.addmm(square, square, square, beta=twice, alpha=thrice)
        factor.diagonal().add_(once)
        product, square = factor @ product, factor @ square @ factor
    found: Tensor = product @ wide
    return found.T if tall else found


def _is_matrix(weight: nn.Parameter) -> bool:
    return weight.ndim > 1 and weight[0].numel() >= MIN_MATRIX_INPUTS
