"""Model soups (Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_merge.methods.base import MergeMethod, Paper


@dataclass(frozen=True)
class Soup(MergeMethod):
    """The uniform soup: the mean of the experts' weights.

    The greedy soup is :func:`lightning_merge.merging.greedy_soup.greedy_soup`.

    Args:
        scale: Scaling coefficient of the mean task vector; 1 is the soup itself.
    """

    paper: ClassVar[Paper] = Paper("Wortsman et al.", "ICML", 2022, "2203.05482")
    formula: ClassVar[str] = "θ = 1/T Σ_t θ_t"
