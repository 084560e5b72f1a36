"""Computing entry by entry on pieces of a tensor that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ENTRIES = 2**18
"""Entries of a piece, of all experts together: a few temporaries of that size fit the cache."""

_ALIGNMENT = 2**10
"""Pieces start at multiples of this, so that sums over the experts round as they do on the whole."""


def pieces(stack: Tensor) -> tuple[Tensor, ...]:
    """Split stacked tensors along their flattened entries: ``(T, …) -> (T, n), (T, n'), …``, views where possible."""
    rows = stack.reshape(len(stack), stack[0].numel())
    size = max(_ENTRIES // len(rows) // _ALIGNMENT, 1) * _ALIGNMENT
    count = max(rows.shape[1] // size, 1)
    return rows.split([size] * (count - 1) + [rows.shape[1] - size * (count - 1)], dim=1)  # the last may be longer


def in_pieces(rule: Callable[[Tensor], Tensor], stack: Tensor, as_matrix: bool = False) -> Tensor:
    """Apply an entrywise rule ``(T, …) -> (…)`` piece by piece.

    Args:
        rule: Every entry of what it returns depends on the same entry of the stacked tensors only.
        stack: ``(T, …)``.
        as_matrix: Hand pieces as matrices ``(T, 1, n)`` and not as ``(T, n)``.

    Returns:
        ``(…)``, of the stack's dtype: what the rule gives on the whole.
    """
    update = stack.new_empty(stack.shape[1:])
    start = 0
    for piece in pieces(stack):
        values = rule(piece.unsqueeze(1) if as_matrix else piece)
        update.view(-1)[start : start + piece.shape[1]] = values.view(-1)
        start += piece.shape[1]
    return update


def indicator(compare: Callable[..., Tensor], values: Tensor, other: Tensor | float) -> Tensor:
    """Compare ``(…)`` entry by entry, by ``torch.ge`` and the like; return 1 and 0 in the dtype of the values.

    Sums and products of these are several times faster on a CPU than those of boolean masks.
    """
    return compare(values, other, out=torch.empty_like(values))
