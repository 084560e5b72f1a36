"""The choice of matrices whose subspaces are compared, where all of them would take too long."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

BUDGET = 2.8e12
"""The floating-point operations that comparing subspaces may take; a core of a processor does some 5e10 a second."""


def operations(blocks: int, m: int, n: int, experts: int, merged: int) -> float:
    """Estimate the floating-point operations of comparing a parameter that is seen as ``blocks`` matrices ``(m, n)``.

    Args:
        blocks: The number of matrices.
        m: Their rows.
        n: Their columns.
        experts: The number of experts.
        merged: The number of merged models.
    """
    r, large = min(m, n), max(m, n)
    pairs = experts * (experts - 1) / 2
    factorize = 4 * large * r * r + 20 * r**3  # Gram matrix and singular vectors, eigenvectors (slower than products)
    overlap = 2 * m * r * r
    angles = 6 * r**3
    score = (2 * factorize + experts * 2 * (m * n * r + n * r * r)) * (experts > 1)
    return blocks * ((experts + merged) * factorize + pairs * (overlap + angles) + merged * experts * overlap + score)


def choose(costs: Mapping[str, float], budget: float | None = None) -> list[str]:
    """Choose as many parameters as a budget allows, evenly over kinds and over depth.

    Parameters are of one kind if their names differ by the first number, that of the block. Kinds take turns; the first
    of a kind is taken, then the last, then what lies farthest from those taken. What does not fit is passed over.

    Args:
        costs: The floating-point operations that each parameter takes, by name, in the order of the model.
        budget: The operations that those chosen may take together; by default :data:`BUDGET`.

    Returns:
        The names of those chosen, in the order of the model.
    """
    budget = BUDGET if budget is None else budget
    kinds: dict[str, list[str]] = {}
    for name in costs:
        kinds.setdefault(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name, count=1), []).append(name)
    turns = [[names[i] for i in _spread(len(names))] for names in kinds.values()]
    chosen, spent = set(), 0.0
    for turn in range(max(map(len, turns), default=0)):
        for names in turns:
            if turn < len(names) and spent + costs[names[turn]] <= budget:
                chosen.add(names[turn])
                spent += costs[names[turn]]
    return [name for name in costs if name in chosen]


def _spread(count: int) -> Sequence[int]:
    """Order the numbers below ``count``: the first, the last, and then always the one farthest from those before."""
    order = [0, count - 1][:count]
    left = list(range(1, count - 1))
    while left:
        farthest = max(left, key=lambda i: min(abs(i - j) for j in order))
        order.append(farthest)
        left.remove(farthest)
    return order
