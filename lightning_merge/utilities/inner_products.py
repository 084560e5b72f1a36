"""Inner products of task vectors, which add up over the parameters of a model; norms and cosines follow from them."""

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
        for piece in pieces(vectors):
            wide = piece.double()
            total += wide @ wide.mT
        return total
    for piece, other in zip(pieces(vectors), pieces(others), strict=True):
        total += piece.double() @ other.double().mT
    return total


def norms(products: Tensor) -> Tensor:
    """Compute the norms of vectors from their inner products: ``(T, T) -> (T,)``."""
    return products.diagonal().clamp(min=0).sqrt()


def cosines(products: Tensor) -> Tensor:
    """Compute the cosines between vectors by their inner products: ``(T, T) -> (T, T)``; NaN for a vector of zeros."""
    lengths = norms(products)
    return (products / lengths / lengths[:, None]).clamp(-1, 1)


def pieces(vectors: Tensor) -> tuple[Tensor, ...]:
    """Split stacked tensors ``(T, …)`` into pieces ``(T, entries)``."""
    return vectors.reshape(len(vectors), vectors[0].numel()).split(_CHUNK, dim=1)
