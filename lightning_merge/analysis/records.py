"""The records of a comparison: what was measured of one parameter, one matrix, one group of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ParameterComparison:
    """The comparison of one parameter of T experts, and of the merged models by name.

    Args:
        name: The parameter.
        shape: Its shape.
        products: The inner products of the experts' task vectors, float64 ``(T, T)``.
        moved: The number of entries that at least two experts have changed.
        conflicts: The number of those that two experts have changed in different directions.
        merged_squares: For each merged model the squared norm of its update.
        merged_products: For each merged model the inner products of its update with every task vector, ``(T,)``.
        base_square: The squared norm of the base's parameter.
        base_products: The inner products of the base's parameter with every task vector, ``(T,)``.
    """

    name: str
    shape: tuple[int, ...]
    products: Tensor
    moved: int
    conflicts: int
    merged_squares: Mapping[str, float] = field(default_factory=dict)
    merged_products: Mapping[str, Tensor] = field(default_factory=dict)
    base_square: float = 0.0
    base_products: Tensor | None = None


@dataclass(frozen=True)
class MatrixComparison:
    """The comparison of one task matrix, or of one of the blocks that a parameter consists of.

    Args:
        name: The parameter, and ``[i]`` behind it where it is seen as several matrices.
        shape: ``(m, n)``; ``r`` is the smaller one.
        spectra: The singular values of every expert's task matrix ``(T, r)``; a stored comparison has the leading ones.
        alignment: ``[i, j]``: the subspace alignment ratio of expert i in the leading subspace of expert j, ``(T, T)``.
        angles: ``[i, j]``: the mean principal angle between the experts' leading subspaces, in radians ``(T, T)``.
        merged_spectra: For each merged model the singular values of its update ``(r,)``.
        merged_alignment: For each merged model the subspace alignment ratio of every expert in its update ``(T,)``.
        resolved: The sum over the experts of what SCORE keeps of their projections, ``Σ_score (qT, qT)`` with ``q = r
            // T``, if there are two experts or more; a large one is reduced, see
            :func:`~lightning_merge.analysis.score_map.pool`.
        kept: The share of the experts' off-diagonal energy that SCORE keeps.
        off_diagonal: The share of the experts' projected energy that lies off the diagonal.
        ranks: The dimensions of every expert's leading subspace, T of them.
        effective_ranks: The effective rank of every expert's task matrix ``(T,)``.
        merged_effective_ranks: For each merged model the effective rank of its update.
        agreement: The energy on the diagonal of ``Σ_score``, as a share of that of the task matrices.
        conflict: The energy off the diagonal of ``Σ_score``, as a share of that of the task matrices.
    """

    name: str
    shape: tuple[int, int]
    spectra: Tensor
    alignment: Tensor
    angles: Tensor
    merged_spectra: Mapping[str, Tensor] = field(default_factory=dict)
    merged_alignment: Mapping[str, Tensor] = field(default_factory=dict)
    resolved: Tensor | None = None
    kept: float | None = None
    off_diagonal: float | None = None
    ranks: Sequence[int] = ()
    effective_ranks: Tensor | None = None
    merged_effective_ranks: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    conflict: float | None = None

    @property
    def chance(self) -> float:
        """The alignment of an expert whose entries are independent: ``sqrt(k / m)`` in a subspace of k dimensions."""
        shares = [math.sqrt(rank / self.shape[0]) for rank in self.ranks if rank]
        return sum(shares) / len(shares) if shares else math.nan

    @property
    def pruned(self) -> float | None:
        """The share of the experts' off-diagonal energy that SCORE drops."""
        return None if self.kept is None else 1 - self.kept


@dataclass(frozen=True)
class GroupProfile:
    """The summary of a group of parameters.

    Args:
        norms: The norm of every expert's task vector there ``(T,)``.
        cosine: The mean cosine between the task vectors of two experts; NaN for a single expert.
        sign_conflict: The share of the entries moved by two experts or more where two go different ways.
        update_ratios: For each merged model the norm of its update, divided by the mean of the experts'.
    """

    norms: Tensor
    cosine: float
    sign_conflict: float
    update_ratios: Mapping[str, float]
