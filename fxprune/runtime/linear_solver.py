"""Solutions of systems of linear equations with positive definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix @ x = right`` by a Cholesky factorization, one system at a time.

    Batches are not given to torch as a whole: on several threads their solutions may be wrong (pytorch issue 142815).

    Parameters
    ----------
    matrix : Tensor
        Of shape (n, n) or (G, n, n), symmetric and positive definite.
    right : Tensor
        Of shape (n, k) or (G, n, k).

    Returns
    -------
    Tensor
        Of the shape of `right`. A matrix that holds NaN or infinity gives NaN.
    """
    if matrix.ndim == 3:
        return torch.stack([solve_positive_definite(*pair) for pair in zip(matrix, right, strict=True)])
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(matrix).L)
