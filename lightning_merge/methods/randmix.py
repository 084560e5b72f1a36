"""RandMix, the control of MagMax.

Marczak et al., "MagMax: Leveraging Model Merging for Seamless Continual Learning", ECCV 2024, arXiv 2407.06322.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper


def randmix(deltas: Tensor, choice: Tensor) -> Tensor:
    """Take every entry from one expert.

    Args:
        deltas: ``(T, …)``.
        choice: ``(…)``, the expert's index.

    Returns:
        ``(…)``.
    """
    return deltas.gather(0, choice.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True)
class RandMix(MergeMethod):
    """A random choice among the experts, entry by entry, all equally likely. It shows what MagMax's selection is worth.

    Args:
        scale: Scaling coefficient; 1 in the paper.
    """

    paper: ClassVar[Paper] = Paper("Marczak et al.", "ECCV", 2024, "2407.06322")
    formula: ClassVar[str] = "τ = Δ_s; s drawn from 1 … T"
    draws: ClassVar[bool] = True
    order_matters: ClassVar[bool] = True  # draws go by position

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`randmix`; one draw for all of it, also where it is split."""
        choice = torch.randint(len(deltas), deltas.shape[1:], generator=context.generator("RandMix"))
        return randmix(deltas, choice.to(deltas.device))
