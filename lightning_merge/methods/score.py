"""SCORE (Chaves et al., "Bridging Domains through Subspace-Aware Model Merging", CVPR 2026, arXiv 2603.05768)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.tsv_m import task_singular_basis
from lightning_merge.utilities.tensors import homogeneous, mean

Mode = Literal["trimmed", "diagonal", "off_diagonal", "full"]
Threshold = Literal["code", "paper"]


@homogeneous
def score(
    deltas: Tensor,
    mode: Mode = "trimmed",
    z: float = 1.96,
    divide_by_num_tasks: bool = True,
    threshold: Threshold = "code",
) -> Tensor:
    """Merge task matrices in one orthogonal basis, without the off-diagonal outliers: ``(T, m, n) -> (m, n)``.

    A matrix of rank below the number of experts has no direction to give to each of them; it is averaged.
    """
    if len(deltas) > min(deltas.shape[1:]):
        return mean(deltas)
    U, _, Vt = task_singular_basis(deltas)  # (m, r), (r, n)
    return U @ resolve(project(deltas, U, Vt), mode, z, divide_by_num_tasks, threshold) @ Vt


def project(deltas: Tensor, U: Tensor, Vt: Tensor) -> Tensor:
    """Project every expert's task matrix into one basis: ``(T, m, n) -> (T, r, r)``."""
    return U.mT @ deltas @ Vt.mT


def resolve(projections: Tensor, mode: Mode, z: float, divide_by_num_tasks: bool, threshold: Threshold) -> Tensor:
    """Sum what ``mode`` keeps of every expert's projection: ``(T, r, r) -> (r, r)``."""
    return prune(projections, mode, z, divide_by_num_tasks, threshold).sum(dim=0)


def prune(projections: Tensor, mode: Mode, z: float, divide_by_num_tasks: bool, threshold: Threshold) -> Tensor:
    """Keep what ``mode`` says of every expert's projection: ``(T, r, r) -> (T, r, r)``."""
    if mode == "full":
        return projections
    diagonal = torch.diag_embed(projections.diagonal(dim1=-2, dim2=-1))
    if mode == "diagonal":
        return diagonal
    if divide_by_num_tasks:
        z = z / len(projections)
    trimmed = trim(projections - diagonal, z, threshold)
    return trimmed if mode == "off_diagonal" else trimmed + diagonal


def trim(off_diagonal: Tensor, z: float, threshold: Threshold = "code") -> Tensor:
    """Set the outliers among each expert's off-diagonal entries to zero.

    Args:
        off_diagonal: ``(T, r, r)`` with a zero diagonal.
        z: Entries farther than ``z`` standard deviations from their expert's mean are outliers.
        threshold: ``code`` takes mean and standard deviation over all r² entries, the zero diagonal included, and keeps
            an entry at the threshold; ``paper`` takes them over the r² - r off-diagonal ones and drops it.

    Returns:
        ``(T, r, r)``.
    """
    r = off_diagonal.shape[-1]
    count = r * r if threshold == "code" else max(r * r - r, 1)
    mean = off_diagonal.sum(dim=(-2, -1), keepdim=True) / count
    # The diagonal adds (0 - mean)² per entry to the sum of squares: r entries that `paper` does not count.
    squares = (off_diagonal - mean).square().sum(dim=(-2, -1), keepdim=True) - (r * r - count) * mean.square()
    deviation = (squares / max(count - 1, 1)).sqrt()
    distance = (off_diagonal - mean).abs()
    outlier = distance > z * deviation if threshold == "code" else distance >= z * deviation
    return off_diagonal * ~outlier


@dataclass(frozen=True)
class SCORE(MergeMethod):
    """Subspace conflict-resolving merging. Tensors that are no matrices are averaged.

    The leading singular vectors of all experts form one orthogonal basis; each expert's full task matrix is projected
    into it, off-diagonal outliers (conflicts between subspaces) are dropped, and the rest is summed.

    Args:
        mode: ``trimmed`` is SCORE. The paper's ablations: ``diagonal`` keeps the diagonals only; ``off_diagonal`` the
            trimmed off-diagonals only, as the official code does; ``full`` keeps everything. ``full`` is implemented as
            it is meant, which on square matrices is Task Arithmetic with coefficient 1; the official code adds its
            boolean flag (1.0) to every entry instead of the off-diagonals, so the paper's 7.6 % are not to be expected.
        z: Threshold in standard deviations; must not be negative. Infinity keeps everything.
        divide_by_num_tasks: Divide the threshold by the number of experts, as the official code does for all data sets
            but the medical ones; the paper's text does not mention it.
        threshold: ``code`` follows the official code, ``paper`` the paper's text, see :func:`trim`.
        scale: Scaling coefficient; the paper always uses 1.
    """

    paper: ClassVar[Paper] = Paper("Chaves et al.", "CVPR", 2026, "2603.05768")
    formula: ClassVar[str] = "τ = U (Σ_t diag(P_t) + trim(P_t - diag(P_t))) Vᵀ; P_t = Uᵀ Δ_t V; U = polar([U_1 … U_T])"
    factorizes: ClassVar[bool] = True

    mode: Mode = "trimmed"
    z: float = 1.96
    divide_by_num_tasks: bool = True
    threshold: Threshold = "code"

    def __post_init__(self) -> None:
        check_choice(self, "mode", ("trimmed", "diagonal", "off_diagonal", "full"))
        check_choice(self, "threshold", ("code", "paper"))
        check_range(self, "z", 0, float("inf"))

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix: ``(T, m, n) -> (m, n)``, see :func:`score`."""
        return score(deltas, self.mode, self.z, self.divide_by_num_tasks, self.threshold)
