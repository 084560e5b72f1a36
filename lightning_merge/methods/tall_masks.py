"""TALL-masks.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024, arXiv 2405.07813.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.utilities.tiling import indicator


def tall_masks(deltas: Tensor, merged: Tensor, mask_threshold: float = 0.4) -> Tensor:
    """Mark by 1 where the merged update is closer to each expert's than a share of that: ``(T, …), (…) -> (T, …)``.

    That is ``|delta| > mask_threshold * |merged - delta|``; an entry that did not change is never in a mask.
    """
    return indicator(torch.gt, deltas.abs(), (merged - deltas).abs_().mul_(mask_threshold))


@dataclass(frozen=True)
class TALLMask(Wrapper):
    """The merged update, restricted for each task to the entries that matter to it. Without a task it is not masked.

    Args:
        method: The method that merges, with coefficient 1: Task Arithmetic, or TIES with ``merge="sum"``.
        mask_threshold: The masks' λ, must not be negative; the larger, the sparser. The official code chooses it
            for each task among 0.2, 0.3, 0.4, 0.5, 0.6 on validation data.
        scale: Scaling coefficient; 1 in the paper.
    """

    paper: ClassVar[Paper] = Paper("Wang et al.", "ICML", 2024, "2405.07813")
    formula: ClassVar[str] = "for a task: m_t ∘ τ; m_t = [|Δ_t| > λ |τ - Δ_t|]"
    default_method: ClassVar[MergeMethod] = TaskArithmetic(scale=1.0)

    per_task: ClassVar[bool] = True

    mask_threshold: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "mask_threshold", 0, float("inf"), open_high=True)

    @property
    def entrywise(self) -> bool:  # type: ignore[override]  # that of the method inside
        """Whether the method inside is entrywise."""
        return self.inside.entrywise

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Merge a parameter for one expert's task, ``(T, …) -> (…)``: the merged update where the expert's mask is."""

        def rule(piece: Tensor) -> Tensor:
            merged = self.inside.update(piece, context)
            return merged * tall_masks(piece[expert : expert + 1], merged, self.mask_threshold)[0]

        return self.piecewise(rule, deltas, context)
