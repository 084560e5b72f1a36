"""C²M³: the permutations of several models to a common order, all groups of all models at once.

Crisostomi, Fumero, Baieri, Bernard, Rodolà: C²M³: Cycle-Consistent Multi-Model Merging, NeurIPS 2024, Algorithm 1. Each
model has a matrix for every group, at first a permutation, later a mixture of permutations; each step goes from all of
them towards those that raise the sum of the similarities of all pairs most (a linear assignment for each), as far as
it grows. Groups within a group (the channels within a head) are mixed together with that one: a mixture of orders of
all heads and of what is within them, whose steps :func:`lightning_merge.align.assignment.assign_family` finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_merge.align.assignment import assign_family
from lightning_merge.align.axes import Free, Orders, Product, sources
from lightning_merge.align.descent import compared, pairwise_inner_products
from lightning_merge.align.entries import Entries, Key, entries_along, families, keys_of
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries

STEPS = 200
PATIENCE = 5  # steps that gain almost nothing, and then it ends
TOLERANCE = 1e-7

Mixtures = dict[Key, Tensor]
"""For every key a mixture of permutations ``(n, n)`` of its entries: rows of the result, columns of the model."""


def synchronize(
    models: Sequence[Mapping[str, Tensor]], symmetries: Symmetries, starts: Sequence[Sequence[Permutation]]
) -> list[Permutation]:
    """Find the permutation of every model to a common order, which is none of the models' own.

    Args:
        models: The ordered parameters of every model.
        symmetries: The groups of all models.
        starts: Permutations of all models to start from; the result with the largest sum is kept.
    """
    space = _Space(models, symmetries)
    ends = [space.best_orders(_climb(space, [space.mixtures(one.orders) for one in start])) for start in starts]
    best = max(ends, key=lambda orders: space.value([space.mixtures(one) for one in orders]))
    identity = Permutation.identity(symmetries).orders
    return [Permutation(symmetries, {**identity, **orders}) for orders in best]


def _climb(space: _Space, mixtures: list[Mixtures]) -> list[Mixtures]:
    """Go on from mixtures as long as the value grows."""
    value, idle = space.value(mixtures), 0
    for _ in range(STEPS):
        corners = [space.mixtures(orders) for orders in space.best_orders(space.gradients(mixtures))]
        mixtures = space.best_between(mixtures, corners)
        before, value = value, space.value(mixtures)
        idle = idle + 1 if value - before <= TOLERANCE * abs(value) else 0
        if idle == PATIENCE:
            break
    return mixtures


class _Space:
    """Mixtures of permutations of several models, and the sum of the similarities of all pairs of models."""

    def __init__(self, models: Sequence[Mapping[str, Tensor]], symmetries: Symmetries) -> None:
        self._within = symmetries.within
        names = compared(symmetries)
        self._models = [{name: model[name].double() for name in names} for model in models]
        self._entries = {name: [entries_along(axis, self._within) for axis in symmetries.axes[name]] for name in names}
        self._families = families(symmetries)
        self._sizes = {name: group.size for name, group in symmetries.groups.items()}
        self._keys = keys_of((axis for name in names for axis in symmetries.axes[name]), self._within)
        self._degree = 2 * max((sum(map(len, along)) for along in self._entries.values()), default=1)

    def mixtures(self, orders: Orders) -> Mixtures:
        """Write a permutation as matrices ``(n, n)``."""
        matrices = {}
        for key in self._keys:
            axis = Product(tuple(Free(group, self._sizes[group]) for group in key))
            matrices[key] = torch.eye(axis.size, dtype=torch.float64)[sources(axis, orders, self._within)]
        return matrices

    def best_orders(self, scores: Sequence[Mixtures]) -> list[dict[str, Tensor]]:
        """Find for every model the permutation with the largest inner product with its matrices ``(n, n)``."""
        outer = {key[0] for key in self._keys}
        best: list[dict[str, Tensor]] = []
        for matrices in scores:
            orders: dict[str, Tensor] = {}
            for name in sorted(outer):
                of_family = {key: matrix for key, matrix in matrices.items() if key[0] == name}
                orders |= assign_family(self._families[name], of_family)
            best.append(orders)
        return best

    def value(self, mixtures: Sequence[Mixtures]) -> float:
        """Compute the sum of the similarities of all pairs."""
        total = 0.0
        for name in self._entries:
            total += pairwise_inner_products(self._mixed_all(name, mixtures))
        return total

    def gradients(self, mixtures: Sequence[Mixtures]) -> list[Mixtures]:
        """Compute the derivatives ``(n, n)`` of the value with respect to every matrix."""
        gradients: list[Mixtures] = [{} for _ in mixtures]
        for name in self._entries:
            mixed = self._mixed_all(name, mixtures)
            for model, matrices, result, gradient in zip(self._models, mixtures, mixed, gradients, strict=True):
                others = sum(mixed) - result
                for dim, entries in self._places(name):
                    key, partial = entries.groups, self._mixed(model[name], name, matrices, but=(dim, entries))
                    step = entries.rows(others, dim) @ entries.rows(partial, dim).T
                    gradient[key] = step + gradient.get(key, 0.0)
        return gradients

    def best_between(self, start: Sequence[Mixtures], end: Sequence[Mixtures]) -> list[Mixtures]:
        """Find the best point on the line from one to the other, along which the value is a polynomial."""

        def at(share: float) -> list[Mixtures]:
            return [
                {key: (1 - share) * matrix + share * last[key] for key, matrix in first.items()}
                for first, last in zip(start, end, strict=True)
            ]

        points = (1 - np.cos(np.linspace(0, np.pi, self._degree + 1))) / 2
        values = [self.value(at(float(share))) for share in points]
        line = np.polynomial.Polynomial.fit(points, values, self._degree)
        shares = np.linspace(0, 1, 1001)
        return at(float(shares[line(shares).argmax()]))

    def _places(self, name: str) -> Iterator[tuple[int, Entries]]:
        for dim, along in enumerate(self._entries[name]):
            for entries in along:
                yield dim, entries

    def _mixed_all(self, name: str, mixtures: Sequence[Mixtures]) -> list[Tensor]:
        """Mix one parameter of every model."""
        pairs = zip(self._models, mixtures, strict=True)
        return [self._mixed(model[name], name, matrices) for model, matrices in pairs]

    def _mixed(self, tensor: Tensor, name: str, matrices: Mixtures, but: tuple[int, Entries] | None = None) -> Tensor:
        """Mix a tensor along all its axes, except some entries along one axis."""
        for dim, entries in self._places(name):
            if but is not None and but[0] == dim and but[1] is entries:
                continue
            mixture, rows = matrices[entries.groups], tensor.movedim(dim, 0)
            if torch.equal(entries.places[:, 0], torch.arange(len(rows))):
                rows = torch.tensordot(mixture, rows, dims=1)
            else:
                rows = rows.index_put((entries.places,), torch.tensordot(mixture, rows[entries.places], dims=1))
            tensor = rows.movedim(0, dim)
        return tensor
