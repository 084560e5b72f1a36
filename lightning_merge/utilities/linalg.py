"""Singular value decompositions and polar factors, as model merging needs them.

Everything here is deterministic up to rounding: singular vectors carry a canonical sign, and whatever lies in the null
space of a matrix contributes nothing (where LAPACK would return an arbitrary completion of the basis).

How a matrix is decomposed is decided here and nowhere else; :func:`paths_taken` tells.

* ``gram``: from the eigenvectors of the Gram matrix of the short side, in float64, which is cheaper than an SVD. To
  square a matrix costs half the digits of its small singular values: of float32 input none that it has, so that this is
  more exact than an SVD in float32; of float64 input those below 1e-4 of the largest, and then
* ``svd``: the SVD of LAPACK or cuSOLVER, in float64;
* ``products``: on a GPU, polar factors of float32 input from matrix products alone, where they converge.

Matrices of very large or very small numbers are brought to the size of 1 by a power of two, and their singular values
back, so that nothing overflows on the way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from threading import Lock

import torch
from torch import Tensor

from lightning_merge.utilities.factorization_cache import _factorize
from lightning_merge.utilities.tensors import largest_magnitude, norm, times_power, unit_exponent

_FLOOR = {torch.float64: 1e-4, torch.float32: 1e-6}
"""The share of the largest singular value down to which a Gram matrix in float64 determines one as well as the input
does: in float64 to 1e-8; in float32, whose own rounding is larger, what is below counts as zero."""

_LOSS = 256
"""The most by which a product in float32 may enlarge rounding errors; beyond that it is one in float64."""


def svd(matrices: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading singular triplets of a batch of matrices.

    Args:
        matrices: ``(…, m, n)``.
        rank: How many triplets to return; all ``min(m, n)`` by default.

    Returns:
        ``U (…, m, k)``, ``s (…, k)`` in descending order, ``Vt (…, k, n)``. The entry of largest magnitude in every
        column of ``U`` is positive. Where a singular value is zero to working precision, so are its vectors.
    """
    *batch, m, n = matrices.shape
    k = min(m, n) if rank is None else min(m, n, rank)
    if not k or not matrices.numel():
        return matrices.new_zeros(*batch, m, k), matrices.new_zeros(*batch, k), matrices.new_zeros(*batch, k, n)
    if batch and matrices.device.type == "cpu":  # one after another: no faster in a batch, and smaller
        parts = [svd(matrix, k) for matrix in matrices]
        U, s, Vt = (torch.stack(part) for part in zip(*parts, strict=True))
        return U, s, Vt
    if m < n:
        U, s, Vt = svd(matrices.mT, k)
        U, Vt = Vt.mT, U.mT
    else:
        U, s, Vt = _tall_svd(matrices, k)
    sign = sign_of_largest(U)  # (…, 1, k)
    return U * sign, s, Vt * sign.mT


def _tall_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading triplets of ``(…, m, n)`` with ``m >= n``; NaN where an entry is not finite."""
    largest = largest_magnitude(matrices)
    if not math.isfinite(largest):
        nan = torch.full_like(matrices, torch.nan)
        return nan[..., :rank], nan[..., 0, :rank], nan[..., :rank, :]
    exponent = unit_exponent(largest)
    matrices = times_power(matrices, exponent)
    eigenvalues, V = _factorize(_gram_eigh, matrices)
    s, V = eigenvalues.flip(-1)[..., :rank].clamp(min=0).sqrt(), V.flip(-1)[..., :rank]
    there = s > _FLOOR[matrices.dtype] * s[..., :1]
    if matrices.dtype == torch.float64 and not bool(there.all()):
        U, s, Vt = _factorize(_thin_svd, matrices)
        U, s, Vt = U[..., :rank], s[..., :rank], Vt[..., :rank, :]
        there = s > max(matrices.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., :1]  # as numpy's matrix_rank
    else:
        U, Vt = matrices.double() @ (V / torch.where(there, s, 1).unsqueeze(-2)), V.mT
    U, s, Vt = (part.to(matrices.dtype) for part in (U * there.unsqueeze(-2), s * there, Vt * there.unsqueeze(-1)))
    return U, times_power(s, -exponent), Vt


def polar(matrices: Tensor) -> Tensor:
    """Compute the orthogonal polar factor: the nearest matrix with orthonormal columns (or rows, if it is wide).

    For ``X = U diag(s) Vt`` this is ``U Vt``. A rank-deficient ``X`` has no unique nearest matrix; this returns the
    partial isometry over its range, so that what is zero stays zero.

    Args:
        matrices: ``(…, m, n)``.

    Returns:
        ``(…, m, n)``.
    """
    return _polar(matrices)[0]


def isotropize(matrices: Tensor) -> Tensor:
    """Give matrices a flat spectrum, ``mean(s) U Vt``: ``(…, m, n) -> (…, m, n)``; the mean is over all ``min(m, n)``.

    Nothing happens in the null space of a matrix, see :func:`polar`.
    """
    factor, mean = _polar(matrices)
    return factor * mean[..., None, None]


def _polar(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the polar factor ``(…, m, n)`` and the mean of the singular values ``(…)``."""
    m, n = matrices.shape[-2:]
    if m < n:
        factor, mean = _polar(matrices.mT)
        return factor.mT, mean
    largest = largest_magnitude(matrices)
    if not math.isfinite(largest):
        nan = torch.full_like(matrices, torch.nan)
        return nan, nan[..., 0, 0]
    if exponent := unit_exponent(largest):
        factor, mean = _polar(times_power(matrices, exponent))
        return factor, times_power(mean, -exponent)
    exact = not matrices.is_cuda or torch.get_float32_matmul_precision() == "highest"  # products are not in TF32
    if matrices.dtype == torch.float32 and matrices.is_cuda and exact:
        factor, converged = polar_by_products(matrices)
        if converged:
            return factor, (factor * matrices).sum(dim=(-2, -1)) / n
    eigenvalues, V = _factorize(_gram_eigh, matrices)
    s = eigenvalues.clamp(min=0).sqrt()  # (…, n), ascending
    there = s > _FLOOR[matrices.dtype] * s[..., -1:]
    if matrices.dtype == torch.float64 and not bool(there.all()):
        U, s, Vt = _tall_svd(matrices, n)
        return U @ Vt, s.mean(dim=-1)
    half = V * torch.where(there, s, torch.inf).rsqrt().unsqueeze(-2)
    inverse = gram(half.mT)  # (XᵀX)^(-1/2), symmetric
    benign = exact and bool((torch.where(there, s, torch.inf).amin(dim=-1) * _LOSS >= s[..., -1]).all())
    factor = matrices @ inverse.to(matrices.dtype) if benign else matrices.double() @ inverse
    return factor.to(matrices.dtype), s.mean(dim=-1).to(matrices.dtype)


def polar_by_products(matrices: Tensor, steps: int = 12) -> tuple[Tensor, bool]:
    """Compute polar factors from matrix products alone, by a Newton-Schulz iteration of degree five.

    The first steps lift small singular values by a factor of 3.4 each (the coefficients of Muon; Jordan et al., 2024),
    the last ones converge. What is too small to arrive at 1, the null space above all, is noticed.

    Args:
        matrices: ``(…, m, n)`` with ``m >= n``.
        steps: Half of them lift, half converge.

    Returns:
        ``(…, m, n)``, and whether its columns are orthonormal to rounding.
    """
    size = norm(matrices, dim=(-2, -1), keepdim=True)
    X = matrices / torch.where(size > 0, size, 1)
    lift, converge = (3.4445, -4.7750, 2.0315), (15 / 8, -10 / 8, 3 / 8)
    for a, b, c in (lift,) * (steps // 2) + (converge,) * (steps - steps // 2):
        A = X.mT @ X
        X = a * X + X @ (b * A + c * A @ A)
    unit = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    converged = bool(((X.mT @ X - unit).abs().amax() < 1e-4).all())
    _note("products" if converged else "products, not converged")
    return X, converged


def gram(matrices: Tensor) -> Tensor:
    """Compute Gram matrices in float64: ``(…, m, n) -> (…, n, n)``. Of the symmetric halves one is computed."""
    X = matrices.double()
    n = X.shape[-1]
    if n < 256 or X.is_cuda:
        return X.mT @ X
    G = X.new_empty(*X.shape[:-2], n, n)
    edges = [n * i // 4 for i in range(5)]
    for i, j in pairwise(edges):
        rows = X[..., i:j].mT @ X[..., i:]
        G[..., i:j, i:] = rows
        G[..., i:, i:j] = rows.mT
    return G


def above(values: Tensor, threshold: float) -> Tensor:
    """Mark the singular values ``(…)`` above a threshold; where none is, those above this share of the largest one.

    A threshold is an absolute number; it must not lose experts that have hardly moved altogether.
    """
    largest = values.amax() if values.numel() else 1
    return values > (threshold if largest > threshold else threshold * largest)


def sign_of_largest(U: Tensor) -> Tensor:
    """Find the sign (1 for zero) of the entry of largest magnitude in every column: ``(…, m, k) -> (…, 1, k)``."""
    largest = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)


def _gram_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the eigenvalues ``(…, n)``, ascending, and eigenvectors ``(…, n, n)`` of the Gram matrices."""
    _note("gram")
    return torch.linalg.eigh(gram(matrices))


def _thin_svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the SVD of ``(…, m, n)`` by LAPACK or cuSOLVER."""
    _note("svd")
    return torch.linalg.svd(matrices, full_matrices=False)


_paths: ContextVar[Counter[str] | None] = ContextVar("paths", default=None)
_counting = Lock()


@contextmanager
def paths_taken(counter: Counter[str] | None = None) -> Iterator[Counter[str]]:
    """Count how matrices are decomposed within the block: ``gram``, ``svd``, ``products``; none that is looked up.

    Args:
        counter: Where to add up; by default a new one. What counts outside the block counts on.
    """
    counter = Counter() if counter is None else counter
    outer = _paths.get()
    before = counter.copy()
    token = _paths.set(counter)
    try:
        yield counter
    finally:
        _paths.reset(token)
        if outer is not None:
            outer.update(counter - before)


def _note(path: str) -> None:
    counter = _paths.get()
    if counter is not None:
        with _counting:
            counter[path] += 1
