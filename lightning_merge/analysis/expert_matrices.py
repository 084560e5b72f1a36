"""The subspaces of one task matrix of several experts, each of which is factorized once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_merge.analysis.alignment import RankRule, ratio_of_overlap
from lightning_merge.analysis.angles import mean_angle
from lightning_merge.analysis.records import MatrixComparison
from lightning_merge.analysis.score_map import pool, score_map
from lightning_merge.analysis.spectra import effective_rank
from lightning_merge.utilities.factorization_cache import Factorizations
from lightning_merge.utilities.linalg import svd

_LARGEST_MAP = 256
"""A larger map of SCORE is reduced to this, which is more than a figure shows."""


@dataclass(frozen=True)
class MergedMatrix:
    """The update of a merged model, compared with the experts.

    Args:
        spectrum: The singular values of the update ``(r,)``.
        alignment: The subspace alignment ratio of every expert in the update ``(T,)``.
        effective_rank: The effective rank of the update.
    """

    spectrum: Tensor
    alignment: Tensor
    effective_rank: float


class ExpertMatrices:
    """The task matrices of T experts, by their singular value decompositions.

    Args:
        deltas: ``(T, m, n)``.
        rule: The rule for the dimension of a leading subspace.
    """

    def __init__(self, deltas: Tensor, rule: RankRule) -> None:
        m, n = deltas.shape[1:]
        self._shape = m, n
        self._rule = rule
        with Factorizations().reused():  # SCORE's basis is made of the same singular vectors
            self._U, self._s, _ = svd(deltas)  # (T, m, r), (T, r)
            self._map = score_map(deltas) if 2 <= len(deltas) <= min(m, n) else None
        self._ranks = [rule.rank(s) for s in self._s]

    def compare_merged(self, update: Tensor) -> MergedMatrix:
        """Compare the experts with the update of a merged model ``(m, n)``."""
        U, s, _ = svd(update)
        U = U[:, : self._rule.rank(s)]
        ratios = [ratio_of_overlap(U.mT @ basis, values) for basis, values in zip(self._U, self._s, strict=True)]
        return MergedMatrix(s.cpu(), torch.stack(ratios).cpu(), float(effective_rank(s)))

    def record(self, name: str, merged: Mapping[str, MergedMatrix]) -> MatrixComparison:
        """Compare the experts with each other, and record everything."""
        alignment, angles = self._pairs()
        score = self._map
        return MatrixComparison(
            name=name,
            shape=self._shape,
            spectra=self._s.cpu(),
            alignment=alignment,
            angles=angles,
            merged_spectra={model: update.spectrum for model, update in merged.items()},
            merged_alignment={model: update.alignment for model, update in merged.items()},
            resolved=pool(score.resolved, _LARGEST_MAP).cpu() if score else None,
            kept=score.kept if score else None,
            off_diagonal=score.off_diagonal if score else None,
            ranks=self._ranks,
            effective_ranks=effective_rank(self._s).cpu(),
            merged_effective_ranks={model: update.effective_rank for model, update in merged.items()},
            agreement=score.agreement if score else None,
            conflict=score.conflict if score else None,
        )

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Compute the experts' alignment ``(T, T)`` and mean angles in radians ``(T, T)``, from the same products."""
        U, s, ranks = self._U, self._s, self._ranks
        alignment, angles = torch.zeros(2, len(s), len(s), dtype=torch.float64)
        for i, k in enumerate(ranks):
            alignment[i, i] = ratio_of_overlap(torch.eye(k, len(s[i]), dtype=s.dtype, device=s.device), s[i])
            angles[i, i] = 0.0 if k else torch.nan
        for i, j in combinations(range(len(s)), 2):
            overlap = U[i].mT @ U[j]  # (r, r)
            alignment[i, j] = ratio_of_overlap(overlap.mT[: ranks[j]], s[i])
            alignment[j, i] = ratio_of_overlap(overlap[: ranks[i]], s[j])
            angles[i, j] = angles[j, i] = mean_angle(overlap[: ranks[i], : ranks[j]])
        return alignment, angles
