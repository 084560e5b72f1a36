"""Model Stock (Jang et al., "All we need is just a few fine-tuned models", ECCV 2024, arXiv 2403.19522)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper
from lightning_merge.utilities.tensors import mean, norm


def model_stock(deltas: Tensor) -> Tensor:
    """Interpolate between the base and the mean by the angle between the experts: ``(T, …, d) -> (…, d)``.

    The ratio is ``T cos / (1 + (T - 1) cos)`` with the mean cosine of all pairs of experts. The paper's geometry has
    angles up to 90°; where experts lie farther apart, the formula runs off to minus infinity, and the base is kept.
    """
    T = len(deltas)
    if T == 1:
        return deltas[0].clone()
    cosine = mean_cosine(deltas).clamp(min=0)
    ratio = T * cosine / (1 + (T - 1) * cosine)
    return ratio.unsqueeze(-1) * mean(deltas)


def mean_cosine(deltas: Tensor) -> Tensor:
    """Average the cosines of all pairs of experts along the last dimension: ``(T, …, d) -> (…)``; 0 for zeros."""
    T = len(deltas)
    norms = norm(deltas, dim=-1, keepdim=True)
    directions = deltas / torch.where(norms > 0, norms, 1)
    # The square of the sum of the directions is the sum of all cosines, each pair twice and each expert with itself.
    pairs = directions.sum(dim=0).square().sum(dim=-1) - (norms > 0).sum(dim=0).squeeze(-1)
    return pairs / (T * (T - 1))


@dataclass(frozen=True)
class ModelStock(MergeMethod):
    """Interpolation towards the centre of the fine-tuned models, from the base, layer by layer.

    The paper and its code merge two models; for more, the cosine is the mean over the pairs, as in mergekit.

    Args:
        filter_wise: Take the angle for each output channel (row) of a parameter and not for the whole parameter.
        scale: Scaling coefficient of the update; 1 is the paper's point.
    """

    paper: ClassVar[Paper] = Paper("Jang et al.", "ECCV", 2024, "2403.19522")
    formula: ClassVar[str] = "τ = T cos ω / (1 + (T - 1) cos ω) · 1/T Σ_t Δ_t; ω the angle between the Δ_t"
    dtype: ClassVar[torch.dtype] = torch.float64

    filter_wise: bool = False

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`model_stock`."""
        rows = deltas.shape[1] if self.filter_wise and deltas.ndim > 2 else 1
        return model_stock(deltas.reshape(len(deltas), rows, -1)).reshape(deltas.shape[1:])
