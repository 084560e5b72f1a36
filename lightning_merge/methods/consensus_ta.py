"""Consensus TA.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024, arXiv 2405.07813.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.tall_masks import tall_masks
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.utilities.tiling import indicator


def consensus(deltas: Tensor, merged: Tensor, mask_threshold: float = 0.4, k: int = 2) -> Tensor:
    """Keep the entries of the merged update that lie in at least k TALL masks: ``(T, …), (…) -> (…)``."""
    return merged * indicator(torch.ge, tall_masks(deltas, merged, mask_threshold).sum(dim=0), k)


@dataclass(frozen=True)
class ConsensusTA(Wrapper):
    """The merged update without the entries that matter to no task (catastrophic ones) or to one alone (selfish ones).

    Args:
        method: The method that merges. The masks compare its update before scaling. Consensus TIES is
            ``method=TIES(merge="sum")``.
        mask_threshold: The masks' λ, must not be negative. The official code chooses it for each task among 0.2, 0.3,
            0.4, 0.5, 0.6 on validation data; here it is one for all.
        k: The number of tasks that an entry must matter to, at most the number of experts; 0 keeps everything, 1 drops
            the catastrophic entries only.
        scale: Scaling coefficient; by default that of the method. The official code chooses it on validation data.
    """

    paper: ClassVar[Paper] = Paper("Wang et al.", "ICML", 2024, "2405.07813")
    formula: ClassVar[str] = "τ becomes [Σ_t m_t ≥ k] ∘ τ; m_t = [|Δ_t| > λ |τ - Δ_t|]"
    default_method: ClassVar[MergeMethod] = TaskArithmetic()

    mask_threshold: float = 0.4
    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "mask_threshold", 0, float("inf"), open_high=True)
        check_range(self, "k", 0, float("inf"), open_high=True)

    @property
    def min_experts(self) -> int:  # type: ignore[override]  # at least k
        """The fewest experts that can be merged: k at least, or nothing would be left."""
        return max(self.k, self.inside.min_experts)

    @property
    def entrywise(self) -> bool:  # type: ignore[override]  # that of the method inside
        """Whether the method inside is entrywise."""
        return self.inside.entrywise

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`consensus`."""
        return self._consensus(lambda piece: self.inside.update(piece, context), deltas, context)

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Merge a parameter by what the method inside gives for one expert's task: ``(T, …) -> (…)``."""
        return self._consensus(lambda piece: self.inside.task_update(piece, expert, context), deltas, context)

    def _consensus(self, merge: Callable[[Tensor], Tensor], deltas: Tensor, context: Context) -> Tensor:
        def rule(piece: Tensor) -> Tensor:
            return consensus(piece, merge(piece), self.mask_threshold, self.k)

        return self.piecewise(rule, deltas, context)
