"""STAR (Lee et al., "STAR: Spectral Truncation and Rescale for Model Merging", NAACL 2025, arXiv 2502.10339)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.utilities.linalg import svd
from lightning_merge.utilities.tensors import mean


def star(deltas: Tensor, eta: float = 40.0) -> Tensor:
    """Truncate the spectrum of every task matrix and rescale the rest to the nuclear norm it had.

    Args:
        deltas: ``(T, m, n)``.
        eta: Every expert keeps its fewest singular values that sum up to ``eta`` percent of its nuclear norm.

    Returns:
        ``(T, m, n)``.
    """
    U, s, Vt = svd(deltas)
    norm = s.sum(dim=-1, keepdim=True)  # (T, 1)
    before = s.cumsum(dim=-1) - s  # what the larger singular values sum up to already
    kept = s * (before < norm * (eta / 100))
    left = kept.sum(dim=-1, keepdim=True)
    rescale = norm / torch.where(left > 0, left, 1)
    return (U * (kept * rescale).unsqueeze(-2)) @ Vt


@dataclass(frozen=True)
class STAR(MergeMethod):
    """Spectral truncation and rescale, then the mean. Tensors that are no matrices are averaged.

    The official code merges the matrices of LoRA experts only.

    Args:
        eta: Share of the nuclear norm that every expert keeps, in percent; in (0, 100].
        scale: Scaling coefficient; the paper always uses 1.
    """

    paper: ClassVar[Paper] = Paper("Lee et al.", "NAACL", 2025, "2502.10339")
    formula: ClassVar[str] = "τ = 1/T Σ_t c_t U_t diag(σ_t) V_tᵀ; σ_t leads Δ_t with η % of its sum, c_t restores that"
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (1, 0)

    eta: float = 40.0

    def __post_init__(self) -> None:
        check_range(self, "eta", 0, 100, open_low=True)

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix, ``(T, m, n) -> (m, n)``: the mean of what :func:`star` leaves of every expert."""
        return mean(star(deltas, self.eta))
