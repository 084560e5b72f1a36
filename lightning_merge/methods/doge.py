"""DOGE (ICML 2025, arXiv 2501.01230).

Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.utilities.linalg import svd
from lightning_merge.utilities.order_statistics import kth_magnitude
from lightning_merge.utilities.tensors import norm


def shared_subspace(deltas: Tensor, subspace: int) -> Tensor:
    """Find a basis that the experts share: ``(T, m, n) -> (m, k)`` with ``k = r // subspace``, ``r = min(m, n)``.

    The leading left singular vectors of the experts' ``r // T`` leading left singular vectors.
    """
    T, m, n = deltas.shape
    q = min(m, n) // T
    k = min(min(m, n) // subspace, q * T)
    if k == 0:
        return deltas.new_zeros(m, 0)
    U, _, _ = svd(deltas, q)
    return svd(torch.cat(list(U), dim=1), k)[0]


def modification(deltas: Tensor, weights: Tensor, basis: Tensor, iterations: int, lr: float) -> Tensor:
    """Find the change ``(m, n)`` of all task matrices that brings the merged one nearest to each.

    Minimised by Adam is ``Σ_j ‖rows of Δ_j ∘ (Δ_j - Σ_i λ_i (Δ_i + change))‖²``, where the row of a product is its sum
    over the columns; the gradient's part in the shared subspace is dropped.

    Args:
        deltas: ``(T, m, n)``.
        weights: ``(T,)``, the coefficients λ.
        basis: ``(m, k)`` with orthonormal columns, the shared subspace.
        iterations: Steps of Adam from zero.
        lr: Learning rate.
    """
    change = torch.zeros_like(deltas[0])
    optimizer = torch.optim.Adam([change], lr=lr)
    gap = torch.einsum("tmn,tmn->tm", deltas, deltas - torch.einsum("t,tmn->mn", weights, deltas))  # (T, m)
    for _ in range(iterations):
        rows = gap - weights.sum() * torch.einsum("tmn,mn->tm", deltas, change)
        gradient = -2 * weights.sum() * torch.einsum("tm,tmn->mn", rows, deltas)
        change.grad = gradient - basis @ (basis.mT @ gradient)
        optimizer.step()
    return change


@dataclass(frozen=True)
class DOGE(MergeMethod):
    """DOGE with Task Arithmetic: task matrices, modified to conflict less, trimmed, and summed with equal norms.

    Only matrices are merged; all other parameters stay those of the base, as in the authors' code (which also leaves
    out whatever is not in the encoder).

    Args:
        eta: The norm that every expert's task matrix gets in the sum; must be positive.
        subspace: The rank, divided by this number, is the dimension of the shared subspace; at least 1.
        density: Share of each expert's entries that is kept, by the magnitude of the unmodified ones over all matrices;
            in (0, 1].
        iterations: Steps of Adam.
        lr: Learning rate of Adam; must be positive.
        scale: Scaling coefficient of the update; ``eta`` does its work already.
    """

    paper: ClassVar[Paper] = Paper("Wei et al.", "ICML", 2025, "2501.01230")
    formula: ClassVar[str] = "τ = Σ_t λ_t m_t ∘ (Δ_t + Δ*); λ_t = η / ‖Δ_t‖; Δ* brings the sum nearest to every Δ_t"
    factorizes: ClassVar[bool] = True
    reads_twice: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float64

    eta: float = 0.07
    subspace: int = 6
    density: float = 0.3
    iterations: int = 400
    lr: float = 1e-4

    def __post_init__(self) -> None:
        check_range(self, "eta", 0, float("inf"), open_low=True)
        check_range(self, "subspace", 1, float("inf"))
        check_range(self, "density", 0, 1, open_low=True)
        check_range(self, "iterations", 0, float("inf"))
        check_range(self, "lr", 0, float("inf"), open_low=True)

    def survey(self, task_vectors: TaskVectors) -> Tensor | None:
        """Find every expert's threshold ``(T,)`` over all matrices."""
        names = [name for name in task_vectors if task_vectors.is_matrix(name)]
        total = sum(task_vectors.numel(name) for name in names)
        if total == 0:
            return None
        smallest_kept = max(total - int(total * self.density), 1)
        return kth_magnitude(lambda: (task_vectors[name].flatten(1) for name in names), smallest_kept)

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix, ``(T, m, n) -> (m, n)``: modify, trim, sum."""
        norms = norm(deltas, dim=(-2, -1))
        weights = torch.where(norms > 0, self.eta / norms, 0)  # (T,)
        basis = shared_subspace(deltas, self.subspace)
        change = modification(deltas, weights, basis, self.iterations, self.lr)
        kept = deltas.abs() >= context.survey.view(-1, 1, 1)
        return torch.einsum("t,tmn->mn", weights, (deltas + change) * kept)

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: zero, the base's."""
        return torch.zeros_like(deltas[0])
