"""Subspace alignment: how much of one matrix lies in the directions in which another one acts.

Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML 2025,
arXiv 2502.04959, equations 5 and 6; between two experts: Chaves et al., "Bridging Domains through Subspace-Aware Model
Merging", CVPR 2026, arXiv 2603.05768.

How many singular vectors lead is decided by one of two rules. Equation 6 bounds what is left out, ``‖M - U Uᵀ M‖ <=
error · ‖M‖``. The official codes of both papers ask for what is kept, ``‖U Uᵀ M‖ > threshold · ‖M‖``, which is much
less: a threshold of 0.95 leaves out 0.31 of the norm. They also take one vector less than it needs (``off_by_one``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.linalg import svd
from lightning_merge.utilities.tensors import wide


@dataclass(frozen=True)
class RankRule:
    """The rule for how many singular vectors span a matrix M's leading subspace; give ``error`` or ``threshold``.

    Args:
        error: As few as leave out at most this share, ``‖M - U Uᵀ M‖ <= error · ‖M‖`` (equation 6).
        threshold: As few as keep more than this share, ``‖U Uᵀ M‖ > threshold · ‖M‖``, as in the official codes; all
            whose singular value is not zero if none do.
        off_by_one: One less than the threshold needs, and none if none do: the official codes take the index of the
            vector that reaches it for the number of vectors.

    Raises:
        MergeError: If both or none are given, or if the one given is no share.
    """

    error: float | None = None
    threshold: float | None = None
    off_by_one: bool = False

    def __post_init__(self) -> None:
        if (self.error is None) == (self.threshold is None):
            raise MergeError("A leading subspace is cut by its error or by its threshold; give one of the two.")
        for name, share in (("error", self.error), ("threshold", self.threshold)):
            if share is not None and not 0 <= share <= 1:
                raise MergeError(f"The {name} of a subspace is a share of the matrix, in [0, 1], and {share} is none.")
        if self.off_by_one and self.threshold is None:
            raise MergeError("off_by_one is what the official codes do with a threshold; give one, or leave it out.")

    def rank(self, s: Tensor) -> int:
        """Count the leading singular vectors, from all singular values in descending order ``(r,)``."""
        squares = s.double().square()
        if self.error is not None:
            left_out = squares.flip(0).cumsum(0).flip(0).sqrt()  # by the first 0, 1, … vectors
            return int((left_out > self.error * left_out[:1]).sum())
        assert self.threshold is not None  # one of the two is given
        kept = squares.cumsum(0).sqrt()  # by the first 1, 2, … vectors
        reached = kept > self.threshold * kept[-1:]
        if not bool(reached.any()):
            return 0 if self.off_by_one else int((s > 0).sum())
        return int((~reached).sum()) + (not self.off_by_one)

    def __str__(self) -> str:
        if self.threshold is None:
            return f"as few as leave out at most {self.error:g} of the norm"
        less = ", less one" if self.off_by_one else ""
        return f"as few as keep more than {self.threshold:g} of the norm{less}"


OF_PAPER = RankRule(error=0.05)
"""Equation 6 of Iso-C's paper."""
OF_PAIRS = RankRule(threshold=0.97)
"""The rule by which SCORE's code compares experts, without the one vector that it takes less."""


def subspace_alignment_ratio(
    delta: Tensor,
    merged: Tensor,
    error: float | None = None,
    rank: int | None = None,
    *,
    threshold: float | None = None,
    off_by_one: bool = False,
) -> Tensor:
    """Compute the share of a task matrix that lies in the leading subspace of a merged one: ``‖U Uᵀ Δ‖ / ‖Δ‖``.

    Args:
        delta: The task matrix, or several, ``(…, m, n)``.
        merged: The merged task matrix ``(m, n)``, whose leading left singular vectors are ``U``.
        error: As few vectors as leave out at most this share of the merged matrix, see :class:`RankRule`; by default
            0.05.
        rank: Exactly this number of vectors, instead.
        threshold: As few vectors as keep more than this share, instead.
        off_by_one: One vector less than the threshold needs, as in the official code.

    Returns:
        Between 0 and 1, for every task matrix ``(…)``; NaN where one is zero.
    """
    return projected_ratio(delta, leading_subspace(merged, error, rank, threshold=threshold, off_by_one=off_by_one))


def pairwise_alignment(deltas: Tensor, rule: RankRule = OF_PAIRS) -> Tensor:
    """Compute how much of every expert's task matrix lies in the leading subspace of every other one.

    Args:
        deltas: The task matrices of T experts, ``(T, m, n)``.
        rule: The rule for the dimension of a subspace; by default it keeps more than 0.97 of the norm, as SCORE does.

    Returns:
        ``(T, T)``; at ``[i, j]`` the share of expert i in the subspace of expert j; NaN in the row of a zero matrix.
    """
    U, s, _ = svd(wide(deltas))
    return torch.stack(
        [projected_ratio(deltas, basis[:, : rule.rank(values)]) for basis, values in zip(U, s, strict=True)], dim=1
    )


def leading_subspace(
    matrix: Tensor,
    error: float | None = None,
    rank: int | None = None,
    *,
    threshold: float | None = None,
    off_by_one: bool = False,
) -> Tensor:
    """Compute the leading left singular vectors of a matrix: as few as meet the error or the threshold.

    Args:
        matrix: ``(m, n)``; half precision is computed in float32.
        error: The share of the norm that may be left out, see :class:`RankRule`; by default 0.05.
        rank: Exactly this number of vectors, instead.
        threshold: The share of the norm that must be kept, instead of ``error``.
        off_by_one: One vector less than the threshold needs.

    Returns:
        ``U (m, k)``; without columns for a matrix of zeros.

    Raises:
        MergeError: If the error or the threshold is no share, or if there are not so many singular vectors.
    """
    r = min(matrix.shape)
    if rank is not None and not 0 <= rank <= r:
        raise MergeError(f"A matrix of shape {tuple(matrix.shape)} has {r} singular vectors; a rank of {rank} is none.")
    by_default = error is None and threshold is None
    rule = RankRule(OF_PAPER.error if by_default else error, threshold, off_by_one)
    U, s, _ = svd(wide(matrix), rank)
    return U[:, : rule.rank(s) if rank is None else rank]


def projected_ratio(delta: Tensor, U: Tensor) -> Tensor:
    """Compute the share of matrices that lies in a subspace, ``‖U Uᵀ Δ‖ / ‖Δ‖``.

    Args:
        delta: ``(…, m, n)``; half precision is computed in float32.
        U: An orthonormal basis of the subspace, ``(m, k)``.

    Returns:
        ``(…)``; NaN where a matrix is zero.

    Raises:
        MergeError: If the matrices have other rows than the subspace.
    """
    if delta.shape[-2:-1] != U.shape[:1]:
        raise MergeError(
            f"A matrix of shape {tuple(delta.shape[-2:])} has no part in a subspace of {U.shape[0]} dimensions."
        )
    delta, U = wide(delta), wide(U).to(delta.device)
    dtype = torch.promote_types(delta.dtype, U.dtype)
    delta, U = delta.to(dtype), U.to(dtype)
    return (torch.linalg.matrix_norm(U.mT @ delta) / torch.linalg.matrix_norm(delta)).clamp(max=1)  # but for rounding


def ratio_of_overlap(overlap: Tensor, s: Tensor) -> Tensor:
    """Compute the same share from the overlap of two bases, for ``Δ = V diag(s) Wᵀ``: ``‖Uᵀ V diag(s)‖ / ‖s‖``.

    Args:
        overlap: ``Uᵀ V (k, r)``.
        s: ``(r,)``.

    Returns:
        ``()`` in float64.
    """
    s = s.double()
    return (torch.linalg.vector_norm(overlap.double() * s) / torch.linalg.vector_norm(s)).clamp(max=1)
