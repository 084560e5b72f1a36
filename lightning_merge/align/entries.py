"""The entries along an axis that a family of groups orders: a group, and the groups within it that order them, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_merge.align.axes import Axis, Orders, coordinates, groups_of, sources
from lightning_merge.align.symmetries import Symmetries

Key = tuple[str, ...]
"""The groups that order some entries: ``(outer, inner, …)``, or a single one."""


@dataclass(frozen=True)
class Entries:
    """Entries along one axis that the same groups order.

    Args:
        groups: The outer group, then those within it that order these entries, too.
        places: Where they are ``(n, k)``: a row for every combination of coordinates in the groups, the last group
            running fastest, with the k entries that share it.
    """

    groups: Key
    places: Tensor

    def rows(self, tensor: Tensor, dim: int) -> Tensor:
        """Bring the entries along an axis of a tensor ``(…)`` to the front: ``(n, everything else)``."""
        return tensor.movedim(dim, 0)[self.places.to(tensor.device)].flatten(1)


@dataclass(frozen=True)
class Family:
    """A group and the groups within it, which are matched together.

    Args:
        name: The outer group.
        size: Its number of entries.
        inner: The sizes of the groups within it.
    """

    name: str
    size: int
    inner: Mapping[str, int]

    @property
    def groups(self) -> Key:
        """All groups, the outer one first."""
        return (self.name, *self.inner)


def families(symmetries: Symmetries) -> dict[str, Family]:
    """Collect the families of a model by their outer group."""
    sizes = {name: group.size for name, group in symmetries.groups.items()}
    return {
        name: Family(name, group.size, {child: sizes[child] for child in symmetries.children(name)})
        for name, group in symmetries.groups.items()
        if group.within is None
    }


def families_along(axis: Axis, within: Mapping[str, str]) -> list[str]:
    """List the outer groups of all groups along an axis."""
    return list(dict.fromkeys(within.get(group, group) for group in groups_of(axis)))


def entries_along(axis: Axis, within: Mapping[str, str]) -> list[Entries]:
    """Collect the entries along an axis by the groups that order them; those that no group orders are left out."""
    sizes = {group: int(coordinates(axis, group).max()) + 1 for group in groups_of(axis)}
    by_groups = []
    for outer in families_along(axis, within):
        position = coordinates(axis, outer)
        inner = {group: coordinates(axis, group) for group in sizes if within.get(group) == outer}
        bits = (2**i * (coordinate >= 0) for i, coordinate in enumerate(inner.values()))
        pattern = sum(bits, torch.zeros_like(position))
        for code in pattern[position >= 0].unique().tolist():
            here = ((position >= 0) & (pattern == code)).nonzero()[:, 0]
            groups, index, count = [outer], position[here], sizes[outer]
            for i, (group, coordinate) in enumerate(inner.items()):
                if code >> i & 1:
                    groups.append(group)
                    index, count = index * sizes[group] + coordinate[here], count * sizes[group]
            by_groups.append(Entries(tuple(groups), here[index.argsort(stable=True)].reshape(count, -1)))
    return by_groups


def aligned_but(
    tensor: Tensor, axes: Sequence[Axis], orders: Orders, within: Mapping[str, str], family: str, dim: int
) -> Tensor:
    """Permute a tensor along all its axes, but leave the entries of one family along one axis in their places.

    Args:
        tensor: The tensor ``(…)``.
        axes: Its axes.
        orders: The order of each group, ``(n,)`` or ``(outer, n)``.
        within: For each group that is within another one: that one.
        family: The outer group of the family.
        dim: The axis.
    """
    others = {group: order for group, order in orders.items() if within.get(group, group) != family}
    for at, axis in enumerate(axes):
        if not any(groups_of(axis)):
            continue
        source = sources(axis, others if at == dim else orders, within)
        if not torch.equal(source, torch.arange(len(source))):
            tensor = tensor.index_select(at, source.to(tensor.device))
    return tensor


def keys_of(axes: Iterable[Axis], within: Mapping[str, str]) -> set[Key]:
    """Collect the keys of all entries along some axes."""
    return {entries.groups for axis in axes for entries in entries_along(axis, within)}
