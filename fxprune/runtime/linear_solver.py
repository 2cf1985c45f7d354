"""Solves systems of linear equations with positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` by a Cholesky factorization, one system at a time.

    A batch is solved in a loop: with several threads, torch's batched solutions may be wrong (pytorch issue 142815).

    Parameters
    ----------
    matrix : Tensor
        Shape (n, n) or (G, n, n), symmetric and positive definite.
    right : Tensor
        Shape (n, k) or (G, n, k).

    Returns
    -------
    Tensor
        Solution in the shape of `right`; NaN if the matrix contains NaN or infinity.

    Examples
    --------
    >>> solve_positive_definite(2 * torch.eye(2), torch.ones(2, 1)).flatten()
    tensor([0.5000, 0.5000])
    """
    if matrix.ndim == 3:
        return torch.stack([solve_positive_definite(*pair) for pair in zip(matrix, right, strict=True)])
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(matrix).L)
