"""TIES (Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, check_choice, check_range
from lightning_merge.order_statistics import kth_magnitude

if TYPE_CHECKING:
    from lightning_merge.task_vectors import TaskVectors


def trim(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Reset the entries whose magnitude is below their expert's threshold: ``(T, …), (T,) -> (T, …)``."""
    return deltas * (deltas.abs() >= thresholds.view(-1, *[1] * (deltas.ndim - 1)))


def elect(trimmed: Tensor, majority: Tensor) -> Tensor:
    """Elect a sign per entry by total mass: ``(T, …) -> (…)``; where the mass is zero, the sign of the whole model."""
    sign = trimmed.sum(dim=0).sign()
    return sign.where(sign != 0, majority)


def disjoint_merge(trimmed: Tensor, sign: Tensor, merge: str = "mean") -> Tensor:
    """Merge the entries that agree with the elected sign.

    Args:
        trimmed: ``(T, …)``.
        sign: ``(…)``, the elected signs; where it is 0, negative entries count (as in the official code).
        merge: ``mean`` over the agreeing non-zero entries, their ``sum``, or the ``max`` in magnitude.

    Returns:
        ``(…)``.
    """
    agreeing = trimmed * ((trimmed > 0) == (sign > 0))
    if merge == "mean":
        return agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
    if merge == "sum":
        return agreeing.sum(dim=0)
    return agreeing.abs().amax(dim=0) * sign


@dataclass(frozen=True)
class TIES(MergeMethod):
    """Trim, elect sign, merge. The trimming threshold is that of the expert's whole model, as in the official code.

    Args:
        density: Share of each task vector that is kept, by magnitude; in (0, 1]. The paper keeps 0.2.
        merge: How agreeing entries are merged: ``mean`` (the paper's disjoint mean), ``sum`` or ``max``.
        scale: Scaling coefficient; 1 is the paper's choice where there is no validation data.
    """

    density: float = 0.2
    merge: Literal["mean", "sum", "max"] = "mean"

    def __post_init__(self) -> None:
        check_range(self, "density", 0, 1, open_low=True)
        check_choice(self, "merge", ("mean", "sum", "max"))

    def survey(self, task_vectors: TaskVectors) -> tuple[Tensor, Tensor]:
        """Find every expert's threshold ``(T,)`` and the sign ``()`` that most entries of the model elect."""
        total = sum(task_vectors.numel(name) for name in task_vectors)
        smallest_kept = max(total - int(total * self.density), 1)
        thresholds = kth_magnitude(lambda: (deltas for _, deltas in task_vectors.items()), smallest_kept)
        votes = sum(trim(deltas, thresholds).sum(dim=0).sign().sum() for _, deltas in task_vectors.items())
        return thresholds, votes.sign()

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """``(T, …) -> (…)``: trim, elect, merge."""
        thresholds, majority = context.survey
        trimmed = trim(deltas, thresholds)
        return disjoint_merge(trimmed, elect(trimmed, majority), self.merge)
