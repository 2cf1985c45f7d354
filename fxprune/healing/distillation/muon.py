"""Optimizes weights: matrices by Muon, along orthogonal directions, and the other weights by AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MIN_MATRIX_INPUTS = 16
"""Least number of inputs per output of a matrix. Depthwise kernels, scales and shifts have fewer."""
BLOCK_ROWS = 128
"""Number of outputs per orthogonal block. Larger blocks would take longer than the forward and backward passes."""
BETAS = 0.9, 0.99
MOMENTUM = 0.95
NEWTON_SCHULZ_COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Newton-Schulz coefficients (Jordan et al., 2024). They and `MOMENTUM` are the defaults of `torch.optim.Muon`."""
NEWTON_SCHULZ_ITERATIONS = 5


class MuonAdamW:
    """Applies Muon to matrices and AdamW to all other weights, with the same learning rate.

    Parameters
    ----------
    weights : sequence of Parameter

    Examples
    --------
    >>> optimizer = MuonAdamW(list(model.parameters()))     # doctest: +SKIP
    >>> optimizer.step(1e-3)                                # doctest: +SKIP
    """

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
        """Update the weights by their gradients. A missing gradient counts as zero."""
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        for part in self.optimizers:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices and convolutions, with steps as large as those of AdamW.

    The step size follows Liu et al. (arXiv 2502.16982). `torch.optim.Muon` accepts only matrices and multiplies in
    bfloat16: there, gradients that differ in the last bits of float32, as with another number of processes, lead to
    steps that differ by 1 %. This class computes in float32. It is still faster, because it iterates on the square of
    each matrix.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights by their gradients; blocks of `BLOCK_ROWS` outputs move along orthogonal directions."""
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
    """Return about the nearest matrix with orthonormal rows (or columns, if there are fewer columns).

    The singular values of the result lie between about .7 and 1.2. Each Newton-Schulz iteration (Jordan et al., 2024)
    multiplies ``X`` by a polynomial of ``X @ X.T``. These polynomials commute. So their product is computed first, from
    the small square matrix, and ``X`` is multiplied once.

    Examples
    --------
    >>> newton_schulz(torch.eye(2)).shape
    torch.Size([2, 2])
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
