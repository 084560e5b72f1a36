"""DC-Merge (CVPR 2026, arXiv 2603.06242).

Zhang et al., "DC-Merge: Improving Model Merging with Directional Consistency".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.ties import disjoint_merge, trim
from lightning_merge.methods.tsv_c import truncate
from lightning_merge.methods.tsv_m import task_singular_basis
from lightning_merge.utilities.tensors import mean


def dc_merge(deltas: Tensor, keep_fraction: float = 1e-3) -> Tensor:
    """Merge low-rank task matrices by TIES in one orthogonal basis, and keep the block of every expert.

    Args:
        deltas: ``(T, m, n)``.
        keep_fraction: Share of the ``r²`` entries of its projection that every expert keeps, at least one.

    Returns:
        ``(m, n)``. A matrix of rank below the number of experts is averaged, as in TSV-M.
    """
    T, r = len(deltas), min(deltas.shape[1:])
    if r < T:
        return mean(deltas)
    q = r // T
    U, _, Vt = task_singular_basis(deltas)  # (m, qT), (qT, n)
    projections = U.mT @ truncate(deltas, q) @ Vt.mT  # (T, qT, qT)
    k = min(max(1, int(keep_fraction * r * r)), projections[0].numel())
    thresholds = projections.abs().flatten(1).topk(k).values[:, -1]  # (T,)
    kept = trim(projections, thresholds)
    sign = kept.sum(dim=0).sign()
    merged = disjoint_merge(kept, sign) * (sign != 0)
    return U @ (merged * torch.block_diag(*[merged.new_ones(q, q)] * T)) @ Vt


@dataclass(frozen=True)
class DCMerge(MergeMethod):
    """Merging with directional consistency, as the authors' code for full fine-tuning. No matrices: mean.

    Args:
        keep_fraction: Share of the entries that every expert keeps in the common basis, by magnitude; in (0, 1].
        scale: Scaling coefficient; the authors search it between 0.1 and 3.
    """

    paper: ClassVar[Paper] = Paper("Zhang et al.", "CVPR", 2026, "2603.06242")
    formula: ClassVar[str] = "τ = U (blocks ∘ TIES(P_1, …, P_T)) Vᵀ; P_t = Uᵀ low_rank(Δ_t) V; U = polar([U_1 … U_T])"
    factorizes: ClassVar[bool] = True

    keep_fraction: float = 1e-3

    def __post_init__(self) -> None:
        check_range(self, "keep_fraction", 0, 1, open_low=True)

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix: ``(T, m, n) -> (m, n)``, see :func:`dc_merge`."""
        return dc_merge(deltas, self.keep_fraction)
