"""TSV-M (Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice
from lightning_merge.utilities.linalg import polar, svd
from lightning_merge.utilities.tensors import mean

Variant = Literal["svd", "eig", "lossless", "low_rank"]


def task_singular_vectors(deltas: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put the ``q`` leading singular triplets of all experts side by side: ``U (m, qT)``, ``s (qT,)``, ``Vt (qT, n)``.

    Args:
        deltas: ``(T, m, n)``.
        q: Triplets of each expert.
    """
    U, s, Vt = svd(deltas, q)  # (T, m, q), (T, q), (T, q, n)
    return torch.cat(list(U), dim=1), s.flatten(), Vt.flatten(0, 1)


def task_singular_basis(deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Build one orthogonal basis from the leading singular vectors of every expert.

    Each of the T experts contributes its ``q = r // T`` leading triplets, ``r = min(m, n)``; the concatenated singular
    vectors are orthogonalised by their polar factors. Where T does not divide r, the ``r - qT`` directions left over
    are not used: the official codes fill them with zeros, whose polar factor is whatever LAPACK returns.

    Args:
        deltas: ``(T, m, n)`` with ``T <= min(m, n)``.

    Returns:
        ``U (m, qT)`` and ``Vt (qT, n)`` with orthonormal columns and rows, and ``s (qT,)``, the singular values.
    """
    U, s, Vt = task_singular_vectors(deltas, min(deltas.shape[1:]) // len(deltas))
    return polar(U), s, polar(Vt)


def whiten_by_gram(U: Tensor) -> Tensor:
    """Whiten columns, ``U (UᵀU)^(-1/2)``: ``(m, k) -> (m, k)``. The polar factor, where the columns are independent.

    The constants are the official code's.
    """
    eigenvalues, Q = torch.linalg.eigh(U.mT @ U)
    return U @ (Q / (eigenvalues.abs().sqrt() + 1e-12)) @ Q.mT


def tsv_m(deltas: Tensor, variant: Variant = "svd") -> Tensor:
    """Merge task matrices in the basis of their orthogonalised leading singular vectors: ``(T, m, n) -> (m, n)``.

    A matrix of rank below the number of experts has no direction to give to each of them; it is averaged (but not by
    ``lossless``, where every expert gives all of its directions).
    """
    r = min(deltas.shape[1:])
    q = r if variant == "lossless" else r // len(deltas)
    if q == 0:
        return mean(deltas)
    U, s, Vt = task_singular_vectors(deltas, q)
    if variant == "eig":
        U, Vt = whiten_by_gram(U), whiten_by_gram(Vt.mT).mT
    elif variant != "low_rank":
        U, Vt = polar(U), polar(Vt)
    return (U * s) @ Vt


@dataclass(frozen=True)
class TSVM(MergeMethod):
    """Task Singular Vectors merging: low-rank experts, whitened against each other. Tensors that are no matrices: mean.

    Args:
        variant: ``svd`` is TSV-M: the leading singular vectors are orthogonalised by an SVD. The official code's other
            forms: ``eig`` whitens by the Gram matrix (the same in exact arithmetic, unstable where singular vectors of
            experts are nearly dependent), ``lossless`` takes all singular vectors of every expert, ``low_rank`` is the
            sum of the low-rank experts, not orthogonalised.
        scale: Scaling coefficient; 1 where it is not tuned.
    """

    paper: ClassVar[Paper] = Paper("Gargiulo et al.", "CVPR", 2025, "2412.00081")
    formula: ClassVar[str] = "τ = polar([U_1 … U_T]) diag(σ_1, …, σ_T) polar([V_1 … V_T])ᵀ; U_t, σ_t, V_t lead Δ_t"
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (1, 2)

    variant: Variant = "svd"

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # follows the arguments
        """Float64 for ``eig``, which is unstable."""
        return torch.float64 if self.variant == "eig" else torch.float32

    def __post_init__(self) -> None:
        check_choice(self, "variant", ("svd", "eig", "lossless", "low_rank"))

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix: ``(T, m, n) -> (m, n)``, see :func:`tsv_m`."""
        return tsv_m(deltas, self.variant)
