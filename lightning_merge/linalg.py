"""Singular value decompositions and polar factors, as model merging needs them.

Everything here is deterministic up to rounding: singular vectors carry a canonical sign, and whatever lies in the null
space of a matrix contributes nothing (where LAPACK would return an arbitrary completion of the basis).

In float64 both come from the Gram matrix of the short side, whose symmetric eigenproblem is several times cheaper than
an SVD. Squaring the matrix costs half the digits of small singular values, so where those are asked for, ``svd`` falls
back to the SVD of LAPACK / cuSOLVER. In lower precision a Gram matrix is useless for polar factors (errors of 1e-3
and more), and the SVD is used throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GRAM_FLOOR = 1e-4
"""Singular values below this share of the largest are not taken from a Gram matrix (relative error 1e-16 / 1e-8)."""


def svd(matrices: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading singular triplets of a batch of matrices.

    Args:
        matrices: ``(…, m, n)``.
        rank: How many triplets to return; all ``min(m, n)`` by default.

    Returns:
        ``U (…, m, k)``, ``s (…, k)`` in descending order, ``Vt (…, k, n)``. The entry of largest magnitude in every
        column of ``U`` is positive. Where a singular value is zero to working precision, so are its vectors.
    """
    m, n = matrices.shape[-2:]
    if m < n:
        U, s, Vt = svd(matrices.mT, rank)
        U, Vt = Vt.mT, U.mT
    else:
        rank = n if rank is None else rank
        U, s, Vt = _tall_svd(matrices, rank)
    sign = sign_of_largest(U)  # (…, 1, k)
    return U * sign, s, Vt * sign.mT


def _tall_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of ``(…, m, n)`` with ``m >= n``; NaN where an entry is not finite."""
    if not bool(matrices.isfinite().all()):
        nan = torch.full_like(matrices, torch.nan)
        return nan[..., :rank], nan[..., 0, :rank], nan[..., :rank, :]
    if matrices.dtype == torch.float64:
        eigenvalues, V = torch.linalg.eigh(matrices.mT @ matrices)
        s = eigenvalues.flip(-1)[..., :rank].clamp(min=0).sqrt()
        if bool((s[..., -1] > _GRAM_FLOOR * s[..., 0]).all()):
            V = V.flip(-1)[..., :rank]
            return (matrices @ V) / s.unsqueeze(-2), s, V.mT
    U, s, Vt = torch.linalg.svd(matrices, full_matrices=False)
    U, s, Vt = U[..., :rank], s[..., :rank], Vt[..., :rank, :]
    there = s > _rounding(matrices) * s[..., :1]
    return U * there.unsqueeze(-2), s * there, Vt * there.unsqueeze(-1)


def polar(matrices: Tensor) -> Tensor:
    """Compute the orthogonal polar factor: the nearest matrix with orthonormal columns (or rows, if it is wide).

    For ``X = U diag(s) Vt`` this is ``U Vt``. A rank-deficient ``X`` has no unique nearest matrix; this returns the
    partial isometry over its range, so that what is zero stays zero.

    Args:
        matrices: ``(…, m, n)``.

    Returns:
        ``(…, m, n)``.
    """
    return isotropic(matrices)[0]


def isotropic(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the polar factor ``(…, m, n)`` of a batch of matrices together with their singular values ``(…, r)``."""
    m, n = matrices.shape[-2:]
    if m < n:
        factor, s = isotropic(matrices.mT)
        return factor.mT, s
    if not bool(matrices.isfinite().all()):
        nan = torch.full_like(matrices, torch.nan)
        return nan, nan[..., 0, :]
    if matrices.dtype == torch.float64:
        eigenvalues, V = torch.linalg.eigh(matrices.mT @ matrices)
        s = eigenvalues.clamp(min=0).sqrt()
        if bool((s[..., 0] > _GRAM_FLOOR * s[..., -1]).all()):
            return matrices @ (V / s.unsqueeze(-2)) @ V.mT, s.flip(-1)
    U, s, Vt = _tall_svd(matrices, n)
    return U @ Vt, s


def _rounding(matrices: Tensor) -> float:
    """The share of the largest singular value below which another one is rounding error, as numpy's matrix_rank."""
    return max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps


def sign_of_largest(U: Tensor) -> Tensor:
    """The sign (1 for zero) of the entry of largest magnitude in every column: ``(…, m, k) -> (…, 1, k)``."""
    largest = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
