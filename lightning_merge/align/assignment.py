"""The linear assignment problems of matching: one for a group, and one in the other for groups within a group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge.align.axes import Orders
from lightning_merge.align.entries import Family, Key


def assign(scores: Tensor) -> Tensor:
    """Find the order ``(n,)`` with the largest sum of ``scores[i, order[i]]``, where the scores are ``(n, n)``."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(scores.cpu().numpy(), maximize=True)[1]).long()


def assign_family(family: Family, scores: Mapping[Key, Tensor], fixed: Orders | None = None) -> dict[str, Tensor]:
    """Find the orders of a group and of those within it with the largest total score.

    For every pair of outer entries (two heads) the best orders within them are found first; the sum of what they reach
    is the score of the pair. All groups within one group share its order, which keeps what attention computes. If
    some entries are ordered by two groups within the same group (the query heads and the channels of grouped-query
    attention), the orders of a pair are found in turn, until the score no longer grows.

    Args:
        family: The groups.
        scores: For every key the similarities ``(n, n)`` of its entries: those of the reference in rows, those of the
            other model in columns.
        fixed: Orders ``(n,)`` or ``(outer, n)`` that stay. Those within a group need that group's own order, too.

    Returns:
        The orders of all groups of the family that are scored or fixed: ``(n,)``, or ``(outer, n)``.
    """
    found = dict(fixed or {})
    if not family.inner:
        return found if family.name in found else {family.name: assign(scores[family.name,])}
    blocks = {key[1:]: _as_blocks(family, key, matrix.cpu()) for key, matrix in scores.items()}
    known = {group: order for group, order in found.items() if group != family.name}

    def best(i: int, j: int) -> tuple[dict[str, Tensor], float]:
        pair = {inner: block[i, j] for inner, block in blocks.items()}
        return _assign_pair(family.inner, pair, {group: order[i] for group, order in known.items()})

    size = range(family.size)
    if family.name not in found:
        found[family.name] = assign(torch.tensor([[best(i, j)[1] for j in size] for i in size], dtype=torch.float64))
    chosen = [best(i, j)[0] for i, j in enumerate(found[family.name].tolist())]
    return found | {group: torch.stack([orders[group] for orders in chosen]) for group in chosen[0]}


def _as_blocks(family: Family, key: Key, matrix: Tensor) -> Tensor:
    """Rearrange ``(h·a·b, h·a·b)`` as ``(h, h, a, b, a, b)``."""
    shape = [family.size, *(family.inner[group] for group in key[1:])]
    return matrix.reshape(*shape, *shape).movedim(len(shape), 1)


def _assign_pair(
    sizes: Mapping[str, int], blocks: Mapping[Key, Tensor], known: Orders
) -> tuple[dict[str, Tensor], float]:
    """Find the best orders within one pair of outer entries, and their score.

    Args:
        sizes: The sizes of the groups within.
        blocks: The scores by the groups within ``(a, b, …, a, b, …)``.
        known: The orders of groups that stay as they are.
    """
    orders, reached = dict(known), -float("inf")
    free = [group for group in dict.fromkeys(group for key in blocks for group in key) if group not in known]
    alone = all(len(key) < 2 for key in blocks)
    free.sort(key=lambda group: (group,) not in blocks)  # first those whose scores need no other order
    while True:
        for group in free:
            scores = [_given(block, key, orders, group) for key, block in blocks.items() if group in key]
            scored = [score for score in scores if score is not None]
            orders[group] = assign(sum(scored)) if scored else torch.arange(sizes[group])
        value = sum(float(_given(block, key, orders, None)) for key, block in blocks.items())
        if alone or value <= reached + 1e-12 * abs(reached):
            return orders, value
        reached = value


def _given(block: Tensor, key: Key, orders: Orders, group: str | None) -> Tensor | None:
    """Return the scores of one group ``(n, n)`` where the others have their orders, or the value where all have one.

    None if this cannot be said yet.
    """
    left = list(key)
    for other in key:
        if other == group:
            continue
        if other not in orders:
            return None
        at = left.index(other)
        block = block.movedim((at, len(left) + at), (0, 1))
        block = block[torch.arange(len(block)), orders[other]].sum(0)
        left.remove(other)
    return block
