"""DELLA.

Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", 2024,
arXiv 2406.11617.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.magnitude import match_l1
from lightning_merge.methods.ties import TIES


def keep_probabilities(deltas: Tensor, density: float, epsilon: float) -> Tensor:
    """Assign larger entries of a row a higher probability to stay.

    Args:
        deltas: ``(T, …)``; rows are those of a matrix, the kernels of a convolution's outputs, or a whole vector.
        density: The mean probability of a row.
        epsilon: The smallest entry of a row has ``density - epsilon``, the largest ``density + epsilon``, and those
            between them are spread evenly by rank.

    Returns:
        ``(T, …)``.
    """
    rows = deltas.flatten(2) if deltas.ndim > 2 else deltas.reshape(len(deltas), 1, -1)
    if rows.shape[-1] == 1:
        return torch.full_like(deltas, density)
    ranks = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    steps = ranks.reshape(deltas.shape).to(deltas) / (rows.shape[-1] - 1)  # from 0 to 1
    return density - epsilon + 2 * epsilon * steps


@dataclass(frozen=True)
class DELLA(Wrapper):
    """Drop by magnitude: a random sparsification that spares large entries, merged by another method.

    The paper elects signs and fuses what is left by TIES without trimming, the default.

    Args:
        method: The method that merges what is left.
        density: Share of the entries that is kept in the mean, in (0, 1].
        epsilon: Half the range of the probabilities, as in mergekit (the paper's ε is the whole range); must not be
            negative, and ``density ± epsilon`` must lie in (0, 1). Without effect where density is 1.
        rescale: Divide what is left by its ``probability``, so that the expectation stays (the paper); or rescale it
            to the ``l1`` norm that the tensor had (mergekit); or ``none``.
        scale: Scaling coefficient of the update; by default that of the method inside.
    """

    paper: ClassVar[Paper] = Paper("Deep et al.", "arXiv", 2024, "2406.11617")
    formula: ClassVar[str] = "Δ_t becomes m_t ∘ Δ_t / p_t; m_t ~ Bernoulli(p_t); p_t rises with |Δ_t| in its row"
    draws: ClassVar[bool] = True
    order_matters: ClassVar[bool] = True  # draws go by position
    default_method: ClassVar[MergeMethod] = TIES(trim="none")

    density: float = 0.5
    epsilon: float = 0.15
    rescale: Literal["probability", "l1", "none"] = "probability"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "density", 0, 1, open_low=True)
        if self.density < 1:
            check_range(self, "epsilon", 0, min(self.density, 1 - self.density), open_high=True)
        check_choice(self, "rescale", ("probability", "l1", "none"))

    def transform(self, deltas: Tensor, context: Context) -> Tensor:
        """Change the task tensors, ``(T, …) -> (T, …)``: drop at random, rescale."""
        if self.density == 1:
            return deltas
        probabilities = keep_probabilities(deltas, self.density, self.epsilon)
        draws = torch.rand(deltas.shape, generator=context.generator("DELLA"))
        sparse = deltas * (draws.to(deltas.device) < probabilities)
        if self.rescale == "probability":
            return sparse / probabilities
        return match_l1(sparse, deltas) if self.rescale == "l1" else sparse
