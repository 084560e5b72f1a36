"""SVC (ICML 2026, arXiv 2602.05536).

Li et al., "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging".
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.utilities.linalg import svd


def svc(merged: Tensor, deltas: Tensor, alpha: float | None = None) -> Tensor:
    """Calibrate the singular values of a merge, so that what the experts share is not counted several times.

    With the merge's left singular vectors ``u_r``, ``p_ri = <u_rᵀ merged, u_rᵀ delta_i> / |u_rᵀ delta_i|²`` says how
    many times the merge holds what expert i has in direction r; ``s_r`` is multiplied by ``T / Σ_i max(alpha, p_ri)``.

    Args:
        merged: ``(m, n)``.
        deltas: ``(T, m, n)``.
        alpha: See :class:`SVC`.

    Returns:
        ``(m, n)``.
    """
    T = len(deltas)
    U, s, Vt = svd(merged)
    rows = s.unsqueeze(-1) * Vt  # Uᵀ merged (k, n)
    responses = U.mT @ deltas  # (T, k, n)
    strength = responses.square().sum(dim=-1)  # (T, k)
    rounding = (max(deltas.shape[1:]) * torch.finfo(s.dtype).eps) ** 2 * deltas.square().sum(dim=(-2, -1)).unsqueeze(-1)
    there = strength > rounding  # an expert that has nothing in a direction must not outweigh the others there
    projection = torch.where(there, (responses * rows).sum(dim=-1) / strength, 0)
    gain = T / projection.clamp(min=1 / T if alpha is None else alpha).sum(dim=0)  # (k,)
    return (U * gain) @ rows


@dataclass(frozen=True)
class SVC(Wrapper):
    """Singular value calibration of another method's merge. What is no matrix stays as that method merges it.

    The calibration depends on the size of the merge, so here the method inside merges with its own ``scale``. The
    official code leaves embeddings out, too: ``Matrices(exclude=("*text_projection*", "*embedding*"))``.

    Args:
        method: The method whose merge is calibrated.
        alpha: Lower bound of the projections, positive: no singular value grows by more than its inverse. By default 1
            over the number of experts, as the authors take it; for TSV-M they take 1.
        scale: Scaling coefficient of the calibrated update.
    """

    paper: ClassVar[Paper] = Paper("Li et al.", "ICML", 2026, "2602.05536")
    formula: ClassVar[str] = "σ_r of τ becomes σ_r T / Σ_t max(α, p_rt); p_rt = ⟨u_rᵀ τ, u_rᵀ Δ_t⟩ / ‖u_rᵀ Δ_t‖²"
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (0, 1)
    reads_twice: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float64
    default_method: ClassVar[MergeMethod] = TaskArithmetic()

    alpha: float | None = None
    _: KW_ONLY
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            check_range(self, "alpha", 0, float("inf"), open_low=True, open_high=True)

    def survey(self, task_vectors: TaskVectors) -> Any:
        """Let the method inside survey the task vectors, which it sees as they are."""
        return self.inside.survey(task_vectors)

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Calibrate the update of the method inside: ``(T, …) -> (…)``."""
        return self._calibrate(super().update(deltas, context), deltas, context)

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Calibrate the update for one expert's task: ``(T, …) -> (…)``."""
        return self._calibrate(super().task_update(deltas, expert, context), deltas, context)

    def _calibrate(self, update: Tensor, deltas: Tensor, context: Context) -> Tensor:
        update = self.inside.scale * update
        merged = context.matrices.blocks(context.name, update.unsqueeze(0))
        experts = context.matrices.blocks(context.name, deltas)
        if merged is None or experts is None:
            return update
        blocks = [svc(m[0], e, self.alpha) for m, e in zip(merged, experts, strict=True)]
        return torch.cat(blocks).reshape(update.shape)
