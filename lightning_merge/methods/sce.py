"""SCE (Wan et al., "FuseChat: Knowledge Fusion of Chat Models", 2024, arXiv 2408.07990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.magnitude import largest
from lightning_merge.methods.ties import per_expert
from lightning_merge.utilities.tensors import homogeneous


@homogeneous
def sce(deltas: Tensor, select_topk: float = 1.0) -> Tensor:
    """Select the entries that vary most, calculate weights by energy, erase the minority's signs.

    Args:
        deltas: ``(T, …)``.
        select_topk: Share of the entries that vary between the experts that is kept, by variance; 1 keeps everything.

    Returns:
        ``(…)``, the weighted mean of the selected entries that agree with the sign of the sum (positive where it is 0).
    """
    if select_topk < 1:
        variances = deltas.var(dim=0, unbiased=False)
        count = int(variances.count_nonzero() * select_topk)
        deltas = deltas * largest(variances.flatten(), count).view_as(variances)
    weights = deltas.square().reshape(len(deltas), -1).mean(dim=1)
    size = weights.sum()
    weights = weights / torch.where(size > 0, size, 1)
    positive = deltas.sum(dim=0) >= 0
    agreeing = torch.where(positive, deltas > 0, deltas < 0) * per_expert(weights, deltas)
    total = agreeing.sum(dim=0)
    return (deltas * agreeing).sum(dim=0) / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class SCE(MergeMethod):
    """Select, calculate, erase: a weighted mean whose weights are the experts' mean squares in every tensor.

    mergekit's code (the authors' own contribution) takes equal weights where the mean squares add up to less than 1e-6,
    and divides by at least 1e-6; such absolute floors, which depend on how far the experts have moved, are left out.

    Args:
        select_topk: Share of every tensor's varying entries that is kept, by variance; in (0, 1].
        scale: Scaling coefficient; 1 in the paper.
    """

    paper: ClassVar[Paper] = Paper("Wan et al.", "arXiv", 2024, "2408.07990")
    formula: ClassVar[str] = "τ = Σ_t w_t a_t ∘ Δ_t / Σ_t w_t a_t; w_t = mean(Δ_t²); a_t = [sign(Δ_t) = sign(Σ_j Δ_j)]"

    select_topk: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "select_topk", 0, 1, open_low=True)

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`sce`."""
        return sce(deltas, self.select_topk)
