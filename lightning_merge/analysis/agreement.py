"""Agreement of experts: norms, cosines, distances and sign conflicts of their task vectors.

All but the signs follow from inner products, which add up over the parameters of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_merge.utilities.inner_products import pieces


def sign_conflicts(deltas: Tensor) -> tuple[int, int]:
    """Count the entries where experts want different signs (Yadav et al., "TIES-Merging", NeurIPS 2023, 2306.01708).

    Args:
        deltas: The task tensors of T experts ``(T, …)``, not trimmed.

    Returns:
        The number of entries that at least two experts have changed, and of those that two have changed in different
        directions.
    """
    moved = conflicts = 0
    for piece in pieces(deltas):
        up, down, once, twice = torch.zeros(4, piece.shape[1], dtype=torch.bool, device=piece.device)
        for delta in piece:
            rises, falls = delta > 0, delta < 0
            moves = rises | falls
            twice |= once & moves
            once |= moves
            up |= rises
            down |= falls
        moved += int(twice.sum())
        conflicts += int((up & down).sum())
    return moved, conflicts


def distances(products: Tensor, merged_square: float, merged_products: Tensor) -> Tensor:
    """Compute the distances of a merged model to the experts, ``‖θ_merged - θ_i‖``.

    Args:
        products: The inner products of the experts' task vectors ``(T, T)``.
        merged_square: The squared norm of the merged model's update.
        merged_products: The inner products of the update with the task vectors ``(T,)``.

    Returns:
        ``(T,)``; distances below 1e-8 of the norms are rounding.
    """
    return (products.diagonal() - 2 * merged_products + merged_square).clamp(min=0).sqrt()
