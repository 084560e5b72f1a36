"""CART (Choi et al., "Revisiting Weight Averaging for Model Merging", 2024, arXiv 2412.12153)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.tsv_c import truncate


def cart(deltas: Tensor, rank: int, coefficient: float = 1.0) -> Tensor:
    """Add low-rank forms of the task matrices, centred at their mean, to the mean: ``(T, m, n) -> (m, n)``."""
    mean = deltas.mean(dim=0)
    return mean + coefficient * truncate(deltas - mean, rank).sum(dim=0)


@dataclass(frozen=True)
class CART(MergeMethod):
    """Centred arithmetic with rank-reduced task vectors. Tensors that are no matrices are averaged.

    The authors' code treats the weights of attention and MLP layers only as matrices, and averages the others.

    Args:
        rank_ratio: Share of the rank that every centred task matrix keeps; in (0, 1]. The authors use 0.04 to 0.32.
        coefficient: The paper's λ, the coefficient of the sum; the authors use about 1 to 3. 0 is the average.
        rounding: ``floor`` keeps ``max(1, int(rank_ratio · r))`` as the authors do, ``ceil`` rounds up, as the code of
            Core Space does.
        scale: Scaling coefficient of the whole update.
    """

    paper: ClassVar[Paper] = Paper("Choi et al.", "arXiv", 2024, "2412.12153")
    formula: ClassVar[str] = "τ = Δ̄ + λ Σ_t low_rank(Δ_t - Δ̄); Δ̄ = 1/T Σ_t Δ_t"
    factorizes: ClassVar[bool] = True

    rank_ratio: float = 0.16
    coefficient: float = 1.0
    rounding: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        check_range(self, "rank_ratio", 0, 1, open_low=True)
        check_range(self, "coefficient", 0, float("inf"), open_high=True)
        check_choice(self, "rounding", ("floor", "ceil"))

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix: ``(T, m, n) -> (m, n)``, see :func:`cart`."""
        rank = self.rank_ratio * min(deltas.shape[1:])
        return cart(deltas, math.ceil(rank) if self.rounding == "ceil" else max(1, int(rank)), self.coefficient)
