"""TSV-M (Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.linalg import polar, svd
from lightning_merge.methods.base import Context, MergeMethod


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
    T, m, n = deltas.shape
    q = min(m, n) // T
    U, s, Vt = svd(deltas, q)  # (T, m, q), (T, q), (T, q, n)
    return polar(torch.cat(list(U), dim=1)), s.flatten(), polar(Vt.flatten(0, 1))


def tsv_m(deltas: Tensor) -> Tensor:
    """Merge task matrices in the basis of their orthogonalised leading singular vectors: ``(T, m, n) -> (m, n)``.

    A matrix of rank below the number of experts has no direction to give to each of them; it is averaged.
    """
    if len(deltas) > min(deltas.shape[1:]):
        return deltas.mean(dim=0)
    U, s, Vt = task_singular_basis(deltas)
    return (U * s) @ Vt


@dataclass(frozen=True)
class TSVM(MergeMethod):
    """Task Singular Vectors merging: low-rank experts, whitened against each other. Tensors that are no matrices: mean.

    Args:
        scale: Scaling coefficient; 1 where it is not tuned.
    """

    dtype: ClassVar[torch.dtype] = torch.float64

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """``(T, m, n) -> (m, n)``, see :func:`tsv_m`."""
        return tsv_m(deltas)
