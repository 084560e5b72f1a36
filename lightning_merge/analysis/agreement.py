"""Agreement of experts: norms, cosines, distances and sign conflicts of their task vectors.

All but the signs follow from inner products, which add up over the parameters of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 16
"""Entries that are looked at together: so few that they stay in the processor's cache."""


def inner_products(vectors: Tensor, others: Tensor | None = None) -> Tensor:
    """Compute the inner products of stacked tensors, summed up in float64.

    Args:
        vectors: ``(T, …)``.
        others: ``(S, …)``; by default ``vectors``.

    Returns:
        ``(T, S)`` in float64.
    """
    sizes = len(vectors), len(vectors if others is None else others)
    total = torch.zeros(sizes, dtype=torch.float64, device=vectors.device)
    if others is None:
        for piece in _pieces(vectors):
            wide = piece.double()
            total += wide @ wide.mT
        return total
    for piece, other in zip(_pieces(vectors), _pieces(others), strict=True):
        total += piece.double() @ other.double().mT
    return total


def sign_conflicts(deltas: Tensor) -> tuple[int, int]:
    """Count the entries where experts want different signs (Yadav et al., "TIES-Merging", NeurIPS 2023, 2306.01708).

    Args:
        deltas: The task tensors of T experts ``(T, …)``, not trimmed.

    Returns:
        The number of entries that at least two experts have changed, and of those that two have changed in different
        directions.
    """
    moved = conflicts = 0
    for piece in _pieces(deltas):
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


def norms(products: Tensor) -> Tensor:
    """Compute the norms of vectors from their inner products: ``(T, T) -> (T,)``."""
    return products.diagonal().clamp(min=0).sqrt()


def cosines(products: Tensor) -> Tensor:
    """Compute the cosines between vectors by their inner products: ``(T, T) -> (T, T)``; NaN for a vector of zeros."""
    lengths = norms(products)
    return (products / lengths / lengths[:, None]).clamp(-1, 1)


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


def _pieces(vectors: Tensor) -> tuple[Tensor, ...]:
    """Split stacked tensors ``(T, …)`` into pieces ``(T, entries)``."""
    return vectors.reshape(len(vectors), vectors[0].numel()).split(_CHUNK, dim=1)
