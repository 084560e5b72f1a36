"""Iso-C (Marczak et al., "No Task Left Behind: Isotropic Model Merging", ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper
from lightning_merge.utilities.linalg import isotropize


def iso_c(deltas: Tensor) -> Tensor:
    """Give the sum of the task matrices a flat spectrum, ``mean(s) U Vt``: ``(T, m, n) -> (m, n)``.

    The mean is over all ``min(m, n)`` singular values. Where the sum has no full rank, as that of a few LoRA experts,
    nothing happens in its null space: it stays zero, and the result does not depend on which vectors LAPACK puts there.
    """
    return isotropize(deltas.sum(dim=0))


@dataclass(frozen=True)
class IsoC(MergeMethod):
    """Isotropic merging in the common subspace. Tensors that are no matrices are averaged.

    Args:
        scale: Scaling coefficient; the paper chooses it on validation data, SCORE's comparison uses 1.
    """

    paper: ClassVar[Paper] = Paper("Marczak et al.", "ICML", 2025, "2502.04959")
    formula: ClassVar[str] = "τ = mean(σ) U Vᵀ; U diag(σ) Vᵀ = Σ_t Δ_t"
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (0, 1)

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix: ``(T, m, n) -> (m, n)``, see :func:`iso_c`."""
        return iso_c(deltas)
