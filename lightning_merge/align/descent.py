"""Coordinate descent over permutation groups: each is given its best order while the others keep theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_merge.align.assignment import assign_family
from lightning_merge.align.entries import Entries, Family, Key, aligned_but, entries_along, families, families_along
from lightning_merge.align.permutation import Permutation
from lightning_merge.align.symmetries import Symmetries

TOLERANCE = 1e-12  # of what the similarity could be at most: smaller gains are rounding, and could go on for ever


def compared(symmetries: Symmetries) -> list[str]:
    """The parameters that are compared: all that are ordered, without statistics."""
    return [name for name in symmetries.axes if name not in symmetries.statistics]


def inner_product(first: Tensor, second: Tensor) -> float:
    """The sum of the products of all entries, in float64."""
    return float(torch.dot(first.double().flatten(), second.double().flatten()))


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
        symmetries = start.symmetries
        self._symmetries, self._within = symmetries, symmetries.within
        names = compared(symmetries)
        self._reference = {name: reference[name] for name in names}
        self._other = {name: other[name].to(reference[name].device) for name in names}
        self._orders = dict(start.orders)
        self._fixed = frozenset(fixed)
        occurrences = [
            _Occurrence(name, dim, entries)
            for name in names
            for dim, axis in enumerate(symmetries.axes[name])
            for entries in entries_along(axis, self._within)
        ]
        self.families = {
            name: family
            for name, family in families(symmetries).items()
            if not self._fixed.issuperset(family.groups)
            and any(occurrence.entries.groups[0] == name for occurrence in occurrences)
        }
        self._occurrences = {
            name: [occurrence for occurrence in occurrences if occurrence.entries.groups[0] == name]
            for name in self.families
        }
        self._changes = dict.fromkeys(families(symmetries), 0)
        self._seen: dict[str, object] = {}
        self._similar = {
            name: inner_product(self._reference[name], start.apply_to(name, self._other[name])) for name in names
        }
        norms = {
            name: float(self._reference[name].double().norm() * self._other[name].double().norm()) for name in names
        }
        self._bounds = {
            family: sum(norms[name] for name in {occurrence.name for occurrence in self._occurrences[family]})
            for family in self.families
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
        names = list(self.families)
        for _ in range(sweeps):
            order = torch.randperm(len(names), generator=generator).tolist()
            if not any([self.visit(names[i]) for i in order]):
                return

    def visit(self, name: str) -> bool:
        """Give one family its best orders; return whether the similarity has grown."""
        family, occurrences = self.families[name], self._occurrences[name]
        versions = [self._version(occurrence) for occurrence in occurrences]
        if self._seen.get(name) == versions:
            return False
        self._seen[name] = versions
        scores: dict[Key, Tensor] = {}
        for occurrence, version in zip(occurrences, versions, strict=True):
            found = self._scores(occurrence, version)
            key = occurrence.entries.groups
            scores[key] = scores[key] + found if key in scores else found
        fixed = {group: self._orders[group] for group in family.groups if group in self._fixed}
        return self._accept(family, assign_family(family, scores, fixed))

    def _accept(self, family: Family, orders: Mapping[str, Tensor]) -> bool:
        """Take new orders if the similarity itself grows, which is no matter of course if a group is on two axes."""
        proposal = Permutation(self._symmetries, self._orders | dict(orders))
        touched = {occurrence.name for occurrence in self._occurrences[family.name]}
        similar = {
            name: inner_product(self._reference[name], proposal.apply_to(name, self._other[name])) for name in touched
        }
        gain = sum(similar[name] - self._similar[name] for name in touched)
        if gain <= TOLERANCE * self._bounds[family.name]:
            return False
        self._orders, self._similar = dict(proposal.orders), self._similar | similar
        self._changes[family.name] += 1
        return True

    def _version(self, occurrence: _Occurrence) -> tuple[int, ...]:
        """How often everything has changed that the scores of an occurrence depend on."""
        own = occurrence.entries.groups[0]
        return tuple(
            self._changes[family]
            for dim, axis in enumerate(self._symmetries.axes[occurrence.name])
            for family in families_along(axis, self._within)
            if dim != occurrence.dim or family != own
        )

    def _scores(self, occurrence: _Occurrence, version: tuple[int, ...]) -> Tensor:
        if occurrence.version != version:
            name, dim, entries = occurrence.name, occurrence.dim, occurrence.entries
            axes = self._symmetries.axes[name]
            aligned = aligned_but(self._other[name], axes, self._orders, self._within, entries.groups[0], dim)
            occurrence.update(entries.rows(self._reference[name], dim), entries.rows(aligned, dim), version)
        return occurrence.scores


class _Occurrence:
    """Entries of one parameter that a family orders, and how similar they are: ``(n, n)``.

    The scores are kept. When other groups have moved, only the columns that have changed are multiplied again.
    """

    def __init__(self, name: str, dim: int, entries: Entries) -> None:
        self.name, self.dim, self.entries = name, dim, entries
        self.version: tuple[int, ...] | None = None
        self.scores = torch.empty(0)
        self._rows = torch.empty(0)

    def update(self, reference: Tensor, rows: Tensor, version: tuple[int, ...]) -> None:
        """Compute the scores of ``(n, K)`` and ``(n, K)``."""
        if self.version is None:
            self.scores = reference.double() @ rows.double().T
        else:
            changed = (rows != self._rows).any(0)
            difference = rows[:, changed].double() - self._rows[:, changed].double()
            self.scores = self.scores + reference[:, changed].double() @ difference.T
        self._rows, self.version = rows, version
