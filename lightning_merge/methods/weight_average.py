"""Weight averaging: the mean of the experts (Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_merge.methods.base import MergeMethod, Paper


@dataclass(frozen=True)
class WeightAverage(MergeMethod):
    """The mean of the experts' weights: the mean is the default rule of every parameter.

    Args:
        scale: Scaling coefficient of the mean task vector; 1 is the average itself.
    """

    paper: ClassVar[Paper] = Paper("Wortsman et al.", "ICML", 2022, "2203.05482")
    formula: ClassVar[str] = "θ = 1/T Σ_t θ_t"
    entrywise: ClassVar[bool] = True
