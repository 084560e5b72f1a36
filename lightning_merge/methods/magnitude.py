"""Magnitude pruning of task vectors, as mergekit does it.

Goddard et al., "Arcee's MergeKit: A Toolkit for Merging Large Language Models", EMNLP 2024 Industry Track,
arXiv 2403.13257.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import per_expert


def largest(values: Tensor, count: int) -> Tensor:
    """Mark by 1 the ``count`` entries of largest magnitude in every row of the last dimension: ``(…, n) -> (…, n)``."""
    return torch.zeros_like(values).scatter_(-1, values.abs().topk(count, dim=-1).indices, 1)


def match_l1(sparse: Tensor, deltas: Tensor) -> Tensor:
    """Rescale each sparse task tensor to the L1 norm of the dense one: ``(T, …), (T, …) -> (T, …)``."""
    before, after = (x.abs().reshape(len(x), -1).sum(dim=1) for x in (deltas, sparse))
    return sparse * per_expert(torch.where(after > 0, before / after, 1), sparse)


def magnitude(deltas: Tensor, density: float, rescale: bool = False) -> Tensor:
    """Keep the ``int(density * numel)`` largest entries, at least one, of each task tensor: ``(T, …) -> (T, …)``."""
    rows = deltas.reshape(len(deltas), -1)
    count = min(max(int(density * rows.shape[1]), 1), rows.shape[1])
    sparse = (rows * largest(rows, count)).reshape(deltas.shape)
    return match_l1(sparse, deltas) if rescale else sparse


@dataclass(frozen=True)
class Magnitude(Wrapper):
    """Each task tensor's largest entries, merged by another method.

    mergekit's TIES, which trims per tensor where the official one trims per model, is
    ``Magnitude(TIES(trim="none"), density=0.2)``.

    Args:
        method: The method that merges what is left.
        density: Share of every tensor that is kept, by magnitude; in (0, 1].
        rescale: Rescale what is left of a tensor to the L1 norm that it had.
        scale: Scaling coefficient of the update; by default that of the method inside.
    """

    paper: ClassVar[Paper] = Paper("Goddard et al.", "EMNLP Industry", 2024, "2403.13257")
    formula: ClassVar[str] = "Δ_t becomes m_t ∘ Δ_t; m_t marks the largest |Δ_t| of every tensor"
    default_method: ClassVar[MergeMethod] = TaskArithmetic()

    density: float = 0.5
    rescale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "density", 0, 1, open_low=True)

    def transform(self, deltas: Tensor, context: Context) -> Tensor:
        """Change the task tensors: ``(T, …) -> (T, …)``, see :func:`magnitude`."""
        return magnitude(deltas, self.density, self.rescale)
