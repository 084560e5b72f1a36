"""The linear assignment problems of matching: one for a group, and one in the other for groups within a group."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

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
    orders = dict(fixed or {})
    if not family.inner:
        return orders if family.name in orders else {family.name: assign(scores[family.name,])}
    blocks = {key[1:]: _as_blocks(family, key, matrix.cpu()) for key, matrix in scores.items()}
    fixed_within = {group: order for group, order in orders.items() if group != family.name}

    def best(i: int, j: int) -> tuple[dict[str, Tensor], float]:
        pair = {inner: block[i, j] for inner, block in blocks.items()}
        return _assign_pair(family.inner, pair, {group: order[i] for group, order in fixed_within.items()})

    outer = range(family.size)
    if family.name not in orders:
        orders[family.name] = assign(torch.tensor([[best(i, j)[1] for j in outer] for i in outer], dtype=torch.float64))
    chosen = [best(i, j)[0] for i, j in enumerate(orders[family.name].tolist())]
    return orders | {group: torch.stack([within[group] for within in chosen]) for group in chosen[0]}


def _as_blocks(family: Family, key: Key, matrix: Tensor) -> Tensor:
    """Rearrange ``(h·a·b, h·a·b)`` as ``(h, h, a, b, a, b)``."""
    shape = [family.size, *(family.inner[group] for group in key[1:])]
    return matrix.reshape(*shape, *shape).movedim(len(shape), 1)


def _assign_pair(
    sizes: Mapping[str, int], blocks: Mapping[Key, Tensor], fixed: Orders
) -> tuple[dict[str, Tensor], float]:
    """Find the best orders within one pair of outer entries, and their score.

    Args:
        sizes: The sizes of the groups within.
        blocks: The scores by the groups within ``(a, b, …, a, b, …)``.
        fixed: The orders ``(n,)`` of groups that stay as they are.
    """
    orders, reached = dict(fixed), -float("inf")
    free = [group for group in dict.fromkeys(group for key in blocks for group in key) if group not in fixed]
    alone = all(len(key) < 2 for key in blocks)
    free.sort(key=lambda group: (group,) not in blocks)  # first those whose scores need no other order
    while True:
        for group in free:
            scores = [
                _reduced(block, key, orders, group)
                for key, block in blocks.items()
                if group in key and {*key} - {group} <= orders.keys()
            ]
            orders[group] = assign(reduce(torch.add, scores)) if scores else torch.arange(sizes[group])
        value = sum(float(_reduced(block, key, orders)) for key, block in blocks.items())
        if alone or value <= reached + 1e-12 * abs(reached):
            return orders, value
        reached = value


def _reduced(block: Tensor, key: Key, orders: Orders, group: str | None = None) -> Tensor:
    """Sum scores over the orders of all groups of a key ``()``, or of all but one ``(n, n)``."""
    left = list(key)
    for other in key:
        if other == group:
            continue
        at = left.index(other)
        block = block.movedim((at, len(left) + at), (0, 1))
        block = block[torch.arange(len(block)), orders[other]].sum(0)
        left.remove(other)
    return block
