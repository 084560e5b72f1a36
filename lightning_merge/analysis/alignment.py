"""Subspace alignment: how much of one matrix lies in the directions in which another one acts.

Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML 2025,
arXiv 2502.04959, equations 5 and 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_merge.errors import MergeError
from lightning_merge.linalg import svd


def subspace_alignment_ratio(delta: Tensor, merged: Tensor, error: float = 0.05, rank: int | None = None) -> Tensor:
    """The share of a task matrix that lies in the leading subspace of a merged one: ``‖U Uᵀ Δ‖ / ‖Δ‖``.

    Args:
        delta: The task matrix, or several, ``(…, m, n)``.
        merged: The merged task matrix ``(m, n)``, whose leading left singular vectors are ``U``.
        error: They are as few as leave out at most this share of the merged matrix, see :func:`leading_subspace`.
        rank: So many instead.

    Returns:
        Between 0 and 1, for every task matrix ``(…)``; NaN where one is zero.
    """
    return projected_ratio(delta, leading_subspace(merged, error, rank))


def leading_subspace(matrix: Tensor, error: float = 0.05, rank: int | None = None) -> Tensor:
    """The leading left singular vectors of a matrix, as few as reach it.

    Args:
        matrix: ``(m, n)``.
        error: How much may be left out: ``k`` is the smallest number with ``‖M - U Uᵀ M‖ <= error · ‖M‖``.
        rank: So many instead.

    Returns:
        ``U (m, k)``; without columns for a matrix of zeros.

    Raises:
        MergeError: If the error is no share.
    """
    if not 0 <= error <= 1:
        raise MergeError(f"The error of a subspace is a share of the matrix, in [0, 1], and {error} is none.")
    U, s, _ = svd(matrix, rank)
    if rank is None:
        left_out = s.double().square().flip(0).cumsum(0).flip(0).sqrt()  # by the first 0, 1, … vectors
        rank = int((left_out > error * left_out[:1]).sum())
    return U[:, :rank]


def projected_ratio(delta: Tensor, U: Tensor) -> Tensor:
    """The share of matrices that lies in a subspace, ``‖U Uᵀ Δ‖ / ‖Δ‖``.

    Args:
        delta: ``(…, m, n)``.
        U: An orthonormal basis of the subspace, ``(m, k)``.

    Returns:
        ``(…)``; NaN where a matrix is zero.
    """
    return torch.linalg.matrix_norm(U.mT @ delta) / torch.linalg.matrix_norm(delta)
