"""TSV-C (Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper
from lightning_merge.utilities.linalg import svd
from lightning_merge.utilities.tensors import mean


def truncate(matrices: Tensor, rank: int) -> Tensor:
    """Compute the nearest matrices of a rank: ``(…, m, n) -> (…, m, n)``; zero for rank 0."""
    if rank == 0:
        return torch.zeros_like(matrices)
    U, s, Vt = svd(matrices, rank)
    return (U * s.unsqueeze(-2)) @ Vt


@dataclass(frozen=True)
class TSVC(MergeMethod):
    """Task Singular Vectors compression: every task keeps its own update, at a T-th of the rank.

    Matrices lose all but their ``r // T`` leading singular triplets, so that T tasks fit into the space of one; tensors
    that are no matrices are kept as they are. Where no task is named, the model is the mean of the compressed experts.
    The official code also compresses ``text_projection``: ``Matrices(exclude=())``.

    Args:
        scale: Scaling coefficient; 1 in the paper.
    """

    paper: ClassVar[Paper] = Paper("Gargiulo et al.", "CVPR", 2025, "2412.00081")
    formula: ClassVar[str] = "for a task: low_rank(Δ_t), of rank r / T; τ = 1/T Σ_t low_rank(Δ_t)"
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (1, 0)
    per_task: ClassVar[bool] = True

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix, ``(T, m, n) -> (m, n)``: the mean of the compressed experts."""
        return mean(truncate(deltas, min(deltas.shape[1:]) // len(deltas)))

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Compress one expert's update: ``(T, …) -> (…)``."""
        blocks = context.matrices.blocks(context.name, deltas)
        if blocks is None:
            return deltas[expert]
        kept = [truncate(block[expert], min(block.shape[1:]) // len(block)) for block in blocks]
        return torch.cat(kept).reshape(deltas.shape[1:])
