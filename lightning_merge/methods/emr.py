"""EMR (Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024, arXiv 2405.17461)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.utilities.tiling import indicator, pieces


def emr(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Elect a unified update and the experts' masks.

    Args:
        deltas: ``(T, …)``.

    Returns:
        ``(…)``, in every entry the largest magnitude among the experts that agree with the sign of the mean (negative
        where that is 0), and ``(T, …)``, 1 where each expert does and 0 elsewhere.
    """
    sign = indicator(torch.gt, deltas.sum(dim=0), 0).mul_(2).sub_(1)
    masks = indicator(torch.gt, deltas * sign, 0)
    return sign * (deltas * masks).abs_().amax(dim=0), masks


@dataclass(frozen=True)
class EMR(MergeMethod):
    """Elect, mask, rescale: one unified update for all, and for each task a mask and a scalar.

    The model for a task is ``base + scale * rescaler * mask * unified``. Without a task it is the unified update.

    Args:
        scale: Scaling coefficient; the paper has none.
    """

    paper: ClassVar[Paper] = Paper("Huang et al.", "NeurIPS", 2024, "2405.17461")
    formula: ClassVar[str] = (
        "τ = s ∘ max |Δ_t| over the t with sign(Δ_t) = s; s = sign(Σ_t Δ_t); for a task: λ_t m_t ∘ τ"
    )
    entrywise: ClassVar[bool] = True
    reads_twice: ClassVar[bool] = True
    per_task: ClassVar[bool] = True

    def survey(self, task_vectors: TaskVectors) -> Tensor:
        """Compute the rescalers ``(T,)``: the experts' summed mean magnitudes, divided by those after masking."""
        magnitudes, masked = [], []
        for _, deltas in task_vectors.stream():
            for piece in pieces(deltas) if deltas.numel() else ():
                unified, masks = emr(piece)
                magnitudes.append(piece.abs().sum(dim=1, dtype=torch.float64) / deltas[0].numel())
                masked.append((masks * unified.abs()).sum(dim=1, dtype=torch.float64) / deltas[0].numel())
        total, total_masked = reduce(torch.add, magnitudes), reduce(torch.add, masked)
        return torch.where(total_masked > 0, total / total_masked, 0).to(deltas)

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: the unified update."""
        return emr(deltas)[0]

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Rescale the unified update where one expert agrees with it: ``(T, …) -> (…)``."""

        def rule(piece: Tensor) -> Tensor:
            unified, masks = emr(piece)
            return context.survey[expert] * masks[expert] * unified

        return self.piecewise(rule, deltas, context)
