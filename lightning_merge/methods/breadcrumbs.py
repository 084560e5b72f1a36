"""Model Breadcrumbs.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024,
arXiv 2312.06795.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.magnitude import largest
from lightning_merge.methods.task_arithmetic import TaskArithmetic


def breadcrumbs(rows: Tensor, beta: float = 0.2, gamma: float = 0.1, remove_first: bool = True) -> Tensor:
    """Mask the largest entries, the outliers, and the small ones of every row.

    Args:
        rows: ``(…, n)``.
        beta: ``int(beta * n)`` entries are kept, the largest ones.
        gamma: ``int(gamma * n)`` entries are removed, the largest ones.
        remove_first: Remove outliers before choosing what is kept; otherwise from what is kept, which leaves fewer.

    Returns:
        ``(…, n)``.
    """
    n = rows.shape[-1]
    if not remove_first:
        rows = rows * largest(rows, int(n * beta))
    rows = rows * (1 - largest(rows, int(n * gamma)))
    return rows * largest(rows, int(n * beta)) if remove_first else rows


@dataclass(frozen=True)
class Breadcrumbs(Wrapper):
    """Task vectors without their outliers and their small entries, merged by Task Arithmetic, or by another method.

    Scalars are left as they are.

    Args:
        method: The method that merges what is left.
        beta: Share of every row that is kept; in (0, 1].
        gamma: Share of every row, its largest entries, that is removed; in [0, 1).
        remove_first: Remove the outliers first, then choose what is kept.
        per: ``row`` masks along the last dimension, as the official code does (numbers are rounded down: of a row of
            four entries, as in the kernel of a convolution, 0.2 keeps nothing). ``layer`` masks every tensor as a
            whole, as the paper's text says and mergekit does.
        scale: Scaling coefficient of the update; 0.4 in the official example.
    """

    paper: ClassVar[Paper] = Paper("Davari and Belilovsky", "ECCV", 2024, "2312.06795")
    formula: ClassVar[str] = "Δ_t becomes m_t ∘ Δ_t; m_t marks the β largest of every row that are not the γ largest"
    default_method: ClassVar[MergeMethod] = TaskArithmetic(scale=0.4)

    beta: float = 0.2
    gamma: float = 0.1
    remove_first: bool = True
    per: Literal["row", "layer"] = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta", 0, 1, open_low=True)
        check_range(self, "gamma", 0, 1, open_high=True)
        check_choice(self, "per", ("row", "layer"))

    def transform(self, deltas: Tensor, context: Context) -> Tensor:
        """Change the task tensors: ``(T, …) -> (T, …)``, see :func:`breadcrumbs`."""
        if deltas.ndim == 1:  # scalars
            return deltas
        rows = deltas if self.per == "row" else deltas.reshape(len(deltas), -1)
        return breadcrumbs(rows, self.beta, self.gamma, self.remove_first).reshape(deltas.shape)
