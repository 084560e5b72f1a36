"""Spectra: the singular values of a matrix, and the number of directions that it acts in."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.linalg import svd
from lightning_merge.utilities.tensors import wide


def singular_values(matrices: Tensor) -> Tensor:
    """Compute the singular values of matrices, in descending order: ``(…, m, n) -> (…, min(m, n))``.

    Half precision is computed in float32. NaN where an entry is not finite.
    """
    return svd(wide(matrices))[1]


def effective_rank(s: Tensor) -> Tensor:
    """Compute the effective rank ``exp(H(p))``, where ``p = s / Σs`` and ``H(p) = -Σ p log p``.

    It is the number of singular values, all of one size, that would be as spread out as these (Roy and Vetterli, "The
    effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1).

    Args:
        s: Singular values ``(…, r)``.

    Returns:
        Between 1 and r in float64 ``(…)``; 0 for a matrix of zeros.
    """
    s = s.double()
    total = s.sum(dim=-1)
    p = s / torch.where(total > 0, total, 1).unsqueeze(-1)
    return torch.where(total == 0, 0.0, (-torch.xlogy(p, p)).sum(dim=-1).exp())


def stable_rank(s: Tensor) -> Tensor:
    """Compute the stable rank ``‖M‖²_F / ‖M‖²_2 = Σ s² / s_1²``: ``(…, r) -> (…)`` in float64; 0 for zeros."""
    squares = s.double().square()
    largest = squares.amax(dim=-1)
    return squares.sum(dim=-1) / torch.where(largest == 0, 1, largest)


def energy_share(s: Tensor, k: int) -> Tensor:
    """Compute the share of the energy in the k largest singular values, ``Σ_{i <= k} s_i² / Σ s²``.

    Args:
        s: Singular values in descending order ``(…, r)``.
        k: The number of singular values; all if there are fewer.

    Returns:
        Between 0 and 1 in float64 ``(…)``; NaN for a matrix of zeros.

    Raises:
        MergeError: If k is negative.
    """
    if k < 0:
        raise MergeError(f"The energy of the k largest singular values needs a k of 0 or more, got {k}.")
    squares = s.double().square()
    return squares[..., :k].sum(dim=-1) / squares.sum(dim=-1)
