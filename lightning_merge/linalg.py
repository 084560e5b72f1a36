"""Singular value decompositions and polar factors, as model merging needs them.

Everything here is deterministic up to rounding: singular vectors carry a canonical sign, and whatever lies in the null
space of a matrix contributes nothing (where LAPACK would return an arbitrary completion of the basis).

In float64 both come from the Gram matrix of the short side, whose symmetric eigenproblem is several times cheaper than
an SVD. Squaring the matrix costs half the digits of small singular values, so where those are asked for, ``svd`` falls
back to the SVD of LAPACK / cuSOLVER. In lower precision a Gram matrix is useless for polar factors (errors of 1e-3
and more), and the SVD is used throughout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

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
        eigenvalues, V = _factorize(_gram_eigh, matrices)
        s = eigenvalues.flip(-1)[..., :rank].clamp(min=0).sqrt()
        if bool((s[..., -1] > _GRAM_FLOOR * s[..., 0]).all()):
            V = V.flip(-1)[..., :rank]
            return (matrices @ V) / s.unsqueeze(-2), s, V.mT
    U, s, Vt = _factorize(_thin_svd, matrices)
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
        eigenvalues, V = _factorize(_gram_eigh, matrices)
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


Factorization = Callable[[Tensor], tuple[Tensor, ...]]


def _gram_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(…, n)``, ascending, and eigenvectors ``(…, n, n)`` of the Gram matrices of ``(…, m, n)``."""
    return torch.linalg.eigh(matrices.mT @ matrices)


def _thin_svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of LAPACK / cuSOLVER."""
    return torch.linalg.svd(matrices, full_matrices=False)


class Factorizations:
    """Factorizations that merges of the same models have in common, so that each is computed once.

    All ranks share the one factorization of a matrix, from which :func:`svd` takes the leading triplets, so the results
    are those without it, bit for bit. A matrix is known again by its bytes.

    What a merge has not asked for is dropped after it, and nothing is added beyond ``max_bytes``: merges ask for the
    same matrices in the same order, so that what is there longest is asked for next.

    Args:
        max_bytes: How much to keep, in bytes.
    """

    def __init__(self, max_bytes: int = 4 << 30) -> None:
        self.max_bytes = max_bytes
        self._found: dict[tuple, tuple[Tensor, ...]] = {}
        self._asked: set[tuple] = set()
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """How much is kept, in bytes."""
        return sum(tensor.nbytes for factors in self._found.values() for tensor in factors)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Reuse factorizations during one merge."""
        self._asked = set()
        token = _factorizations.set(self)
        try:
            yield
        finally:
            _factorizations.reset(token)
            self._found = {key: factors for key, factors in self._found.items() if key in self._asked}

    def get(self, factorize: Factorization, matrices: Tensor) -> tuple[Tensor, ...]:
        """The factorization of ``(…, m, n)``: what was found before, or computed now. Not to be changed in place."""
        content = hashlib.blake2b(matrices.detach().cpu().contiguous().numpy()).digest()
        key = (factorize, content, matrices.shape, matrices.stride(), matrices.dtype, matrices.device)
        with self._lock:
            self._asked.add(key)
            factors = self._found.get(key)
        if factors is None:
            factors = factorize(matrices)
            with self._lock:
                if self.num_bytes + sum(tensor.nbytes for tensor in factors) <= self.max_bytes:
                    self._found[key] = factors
        return factors


_factorizations: ContextVar[Factorizations | None] = ContextVar("factorizations", default=None)


def _factorize(factorize: Factorization, matrices: Tensor) -> tuple[Tensor, ...]:
    """Factorize ``(…, m, n)``, or look it up where :class:`Factorizations` are reused."""
    reused = _factorizations.get()
    return factorize(matrices) if reused is None else reused.get(factorize, matrices)
