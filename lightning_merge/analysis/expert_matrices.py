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
from lightning_merge.analysis.score_map import ScoreMap, pool, score_map
from lightning_merge.analysis.spectra import effective_rank
from lightning_merge.utilities.factorization_cache import Factorizations
from lightning_merge.utilities.linalg import svd

_LARGEST_MAP = 256
"""A larger map of SCORE is reduced to this, which is more than a figure shows."""


@dataclass(frozen=True)
class MergedMatrix:
    """What was found for the update of a merged model.

    Args:
        spectrum: Its singular values ``(r,)``.
        alignment: The subspace alignment ratio of every expert in it ``(T,)``.
        effective_rank: Its effective rank.
    """

    spectrum: Tensor
    alignment: Tensor
    effective_rank: float


class ExpertMatrices:
    """The task matrices of T experts, by their singular value decompositions.

    Args:
        deltas: ``(T, m, n)``.
        rule: How many singular vectors span a leading subspace.
    """

    def __init__(self, deltas: Tensor, rule: RankRule) -> None:
        self._shape = tuple(deltas.shape[1:])
        self._rule = rule
        with Factorizations().reused():  # SCORE's basis is made of the same singular vectors
            self._U, self._s, _ = svd(deltas)  # (T, m, r), (T, r)
            self._map = score_map(deltas) if 2 <= len(deltas) <= min(self._shape) else None
        self._ranks = [rule.rank(s) for s in self._s]

    def compare_merged(self, update: Tensor) -> MergedMatrix:
        """Compare the experts with the update of a merged model ``(m, n)``."""
        U, s, _ = svd(update)
        U = U[:, : self._rule.rank(s)]
        ratios = [ratio_of_overlap(U.mT @ own, values) for own, values in zip(self._U, self._s, strict=True)]
        return MergedMatrix(s.cpu(), torch.stack(ratios).cpu(), float(effective_rank(s)))

    def record(self, name: str, merged: Mapping[str, MergedMatrix]) -> MatrixComparison:
        """Compare the experts with each other, and write down everything."""
        alignment, angles = self._pairs()
        found: ScoreMap | None = self._map
        return MatrixComparison(
            name=name,
            shape=self._shape,
            spectra=self._s.cpu(),
            alignment=alignment,
            angles=angles,
            merged_spectra={key: own.spectrum for key, own in merged.items()},
            merged_alignment={key: own.alignment for key, own in merged.items()},
            resolved=None if found is None else pool(found.resolved, _LARGEST_MAP).cpu(),
            kept=found and found.kept,
            off_diagonal=found and found.off_diagonal,
            ranks=self._ranks,
            effective_ranks=effective_rank(self._s).cpu(),
            merged_effective_ranks={key: own.effective_rank for key, own in merged.items()},
            agreement=found and found.agreement,
            conflict=found and found.conflict,
        )

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The alignment ``(T, T)`` of experts, and the mean angles ``(T, T)`` between them, from the same products."""
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
