"""Coordinate descent over permutation groups: each is given its best order while the others keep theirs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from lightning_merge.align.assignment import assign_family
from lightning_merge.align.entries import Entries, Key, aligned_but, entries_along, families, families_along
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries

TOLERANCE = 1e-12  # of what the similarity could be at most: smaller gains are rounding, and could go on for ever


def compared(symmetries: Symmetries) -> list[str]:
    """List the parameters that are compared: all that are ordered, without statistics."""
    return [name for name in symmetries.axes if name not in symmetries.statistics]


def inner_product(first: Tensor, second: Tensor) -> float:
    """Compute the inner product of two tensors ``(…)`` of one shape, in float64."""
    return float(torch.dot(first.double().flatten(), second.double().flatten()))


def pairwise_inner_products(tensors: Sequence[Tensor]) -> float:
    """Compute the sum of the inner products of all pairs of some tensors ``(…)`` of one shape."""
    return float(reduce(torch.add, tensors).square().sum() - sum(tensor.square().sum() for tensor in tensors)) / 2


class Descent:
    """Coordinate descent over the families of groups.

    Args:
        reference: The ordered parameters of the model that stays as it is.
        other: Those of the model whose channels are put into order.
        start: The permutation to start from.
        fixed: Groups whose order stays; where one is within another group, that one must be fixed, too.
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor],
        other: Mapping[str, Tensor],
        start: Permutation,
        fixed: Collection[str] = (),
    ) -> None:
        self._symmetries, self._within = start.symmetries, start.symmetries.within
        names = compared(start.symmetries)
        self._reference = {name: reference[name] for name in names}
        self._other = {name: other[name].to(reference[name].device) for name in names}
        self._norms = {
            name: float(self._reference[name].double().norm() * other[name].double().norm()) for name in names
        }
        self._orders, self._fixed = dict(start.orders), frozenset(fixed)
        self._similar = self._similarities(names, start)
        self._families = families(start.symmetries)
        self._occurrences = self._find_occurrences(names)
        self._changes = dict.fromkeys(self._families, 0)
        self._seen: dict[str, object] = {}

    def _find_occurrences(self, names: list[str]) -> dict[str, list[_Occurrence]]:
        """Find where the families occur that may get new orders."""
        occurrences: dict[str, list[_Occurrence]] = {}
        for name in names:
            along = [
                (dim, family)
                for dim, axis in enumerate(self._symmetries.axes[name])
                for family in families_along(axis, self._within)
            ]
            for dim, axis in enumerate(self._symmetries.axes[name]):
                for entries in entries_along(axis, self._within):
                    family = entries.groups[0]
                    if not self._fixed.issuperset(self._families[family].groups):
                        others = tuple(other for at, other in along if (at, other) != (dim, family))
                        occurrences.setdefault(family, []).append(_Occurrence(name, dim, entries, others))
        return occurrences

    def _similarities(self, names: Iterable[str], permutation: Permutation) -> dict[str, float]:
        return {
            name: inner_product(self._reference[name], permutation.apply_to(name, self._other[name])) for name in names
        }

    @property
    def permutation(self) -> Permutation:
        """The permutation found so far."""
        return Permutation(self._symmetries, dict(self._orders))

    @property
    def similarity(self) -> float:
        """The similarity reached so far."""
        return sum(self._similar.values())

    def run(self, generator: torch.Generator, sweeps: int) -> None:
        """Visit all families in random order again and again until none gains anything."""
        names = list(self._occurrences)
        for _ in range(sweeps):
            order = torch.randperm(len(names), generator=generator).tolist()
            if not any([self.visit(names[i]) for i in order]):
                return

    def grow(self) -> None:
        """Give every family an order once, first those that share most with what is in order by then.

        What a family shares with others that have no order yet is left out, since it is noise. The model's inputs and
        outputs are in order from the beginning.
        """
        pending = list(self._occurrences)

        def usable(family: str) -> list[_Occurrence]:
            return [
                occurrence
                for occurrence in self._occurrences[family]
                if not set(occurrence.others).intersection(pending)
            ]

        def share(family: str) -> float:
            return self._bound(usable(family)) / max(self._bound(self._occurrences[family]), 1e-300)

        while pending:
            family = max(pending, key=share)
            self._assign(family, usable(family), -math.inf)
            pending.remove(family)

    def visit(self, family: str) -> bool:
        """Give one family its best orders; return whether the similarity has grown."""
        occurrences = self._occurrences[family]
        versions = [self._version(occurrence) for occurrence in occurrences]
        if self._seen.get(family) == versions:
            return False
        self._seen[family] = versions
        return self._assign(family, occurrences, TOLERANCE * self._bound(occurrences))

    def _bound(self, occurrences: list[_Occurrence]) -> float:
        """Compute an upper bound of the similarity of the parameters that the occurrences are in."""
        return sum(self._norms[name] for name in {occurrence.name for occurrence in occurrences})

    def _assign(self, family: str, occurrences: list[_Occurrence], least: float) -> bool:
        """Take the best orders if the similarity itself grows by more than ``least``.

        It need not grow if a family is on two axes of a parameter.
        """
        if not occurrences:
            return False
        scores: dict[Key, Tensor] = {}
        for occurrence in occurrences:
            key = occurrence.entries.groups
            scores[key] = self._scores(occurrence) + scores.get(key, 0.0)
        fixed = {group: self._orders[group] for group in self._families[family].groups if group in self._fixed}
        orders = self._orders | assign_family(self._families[family], scores, fixed)
        touched = {occurrence.name for occurrence in self._occurrences[family]}
        similar = self._similarities(touched, Permutation(self._symmetries, orders))
        if sum(similar[name] - self._similar[name] for name in touched) <= least:
            return False
        self._orders, self._similar = orders, self._similar | similar
        self._changes[family] += 1
        return True

    def _version(self, occurrence: _Occurrence) -> tuple[int, ...]:
        """Count the changes of each family that the scores of an occurrence depend on."""
        return tuple(self._changes[family] for family in occurrence.others)

    def _scores(self, occurrence: _Occurrence) -> Tensor:
        version = self._version(occurrence)
        if occurrence.version != version:
            name, dim, entries = occurrence.name, occurrence.dim, occurrence.entries
            axes = self._symmetries.axes[name]
            aligned = aligned_but(self._other[name], axes, self._orders, self._within, entries.groups[0], dim)
            occurrence.update(entries.rows(self._reference[name], dim), entries.rows(aligned, dim), version)
        return occurrence.scores


class _Occurrence:
    """Entries of one parameter that a family orders, and their similarities ``(n, n)``.

    The scores are kept. When other families have moved, only the columns that have changed are multiplied again.
    """

    def __init__(self, name: str, dim: int, entries: Entries, others: tuple[str, ...]) -> None:
        self.name, self.dim, self.entries = name, dim, entries
        self.others = others  # the families along the parameter's axes, without this one along this axis
        self.version: tuple[int, ...] | None = None
        self.scores = torch.empty(0)
        self._rows = torch.empty(0)

    def update(self, reference: Tensor, rows: Tensor, version: tuple[int, ...]) -> None:
        """Bring the scores up to date with the entries ``(n, K)`` of the reference and of the other model."""
        if self.version is None:
            self.scores = reference.double() @ rows.double().T
        else:
            changed = (rows != self._rows).any(0)
            difference = rows[:, changed].double() - self._rows[:, changed].double()
            self.scores = self.scores + reference[:, changed].double() @ difference.T
        self._rows, self.version = rows, version
