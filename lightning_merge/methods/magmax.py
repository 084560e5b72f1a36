"""MagMax (Marczak et al., "Leveraging Model Merging for Seamless Continual Learning", ECCV 2024, arXiv 2407.06322)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper
from lightning_merge.utilities.tiling import indicator


def magmax(deltas: Tensor) -> Tensor:
    """Keep, entry by entry, the update of largest magnitude; of equal magnitudes the last expert's.

    Args:
        deltas: ``(T, …)``.

    Returns:
        ``(…)``.
    """
    winner = deltas[0]
    for delta in deltas[1:]:
        winner = delta.where(indicator(torch.ge, delta.abs(), winner.abs()).bool(), winner)
    return winner.clone() if len(deltas) == 1 else winner


@dataclass(frozen=True)
class MagMax(MergeMethod):
    """Maximum magnitude selection. Where magnitudes tie, the last expert wins, as in the official code.

    Args:
        scale: Scaling coefficient; 0.5 in the paper, 1 in SCORE's comparison.
    """

    paper: ClassVar[Paper] = Paper("Marczak et al.", "ECCV", 2024, "2407.06322")
    formula: ClassVar[str] = "τ = Δ_s; s = argmax_t |Δ_t|"
    entrywise: ClassVar[bool] = True
    order_matters: ClassVar[bool] = True  # where magnitudes tie

    _: KW_ONLY
    scale: float = 0.5

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`magmax`."""
        return magmax(deltas)
