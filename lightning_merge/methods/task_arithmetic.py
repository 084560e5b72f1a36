"""Task Arithmetic (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """The sum of the task vectors, scaled.

    Args:
        scale: Scaling coefficient. The paper chooses it on validation data; 0.3 is customary, SCORE's paper uses 1.
    """

    paper: ClassVar[Paper] = Paper("Ilharco et al.", "ICLR", 2023, "2212.04089")
    formula: ClassVar[str] = "τ = Σ_t Δ_t"
    entrywise: ClassVar[bool] = True

    _: KW_ONLY
    scale: float = 0.3

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: the sum."""
        return deltas.sum(dim=0)
