"""Where experts agree and fight, and what merging did to them, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ParameterComparison:
    """What was found for one parameter; T experts, and merged models by name.

    Args:
        name: The parameter.
        shape: Its shape.
        products: The inner products of the experts' task vectors, float64 ``(T, T)``.
        moved: Entries that at least two experts have changed.
        conflicts: Those of them where two experts have changed it in different directions.
        merged_squares: For each merged model the squared norm of its update.
        merged_products: For each merged model the inner products of its update with every task vector, ``(T,)``.
    """

    name: str
    shape: tuple[int, ...]
    products: Tensor
    moved: int
    conflicts: int
    merged_squares: Mapping[str, float] = field(default_factory=dict)
    merged_products: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixComparison:
    """What was found for one task matrix, or one of the blocks that a parameter consists of.

    Args:
        name: The parameter, and ``[i]`` behind it where it is seen as several matrices.
        shape: ``(m, n)``; ``r`` is the smaller one.
        spectra: The singular values of every expert's task matrix ``(T, r)``.
        alignment: ``[i, j]``: the subspace alignment ratio of expert i in the leading subspace of expert j, ``(T, T)``.
        angles: ``[i, j]``: the mean principal angle between the leading subspaces of two experts, in radians ``(T, T)``.
        merged_spectra: For each merged model the singular values of its update ``(r,)``.
        merged_alignment: For each merged model the subspace alignment ratio of every expert in its update ``(T,)``.
        resolved: The sum over the experts of what SCORE keeps of their projections, ``Σ_score (r, r)``, if there are two
            experts or more.
        kept: The share of the experts' off-diagonal energy that SCORE keeps.
        off_diagonal: The share of the experts' projected energy that lies off the diagonal.
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


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_experts` found.

    Args:
        experts: Their names, T of them.
        merged: The names of the merged models.
        parameters: Every parameter that the experts share.
        matrices: The matrices whose subspaces were compared.
        left_out: The names of matrices whose subspaces were not compared, to save time.
    """

    experts: Sequence[str]
    merged: Sequence[str]
    parameters: Sequence[ParameterComparison]
    matrices: Sequence[MatrixComparison]
    left_out: Sequence[str] = ()
