"""Nesting of groups: the channels within a head have an order of their own in every head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from lightning_merge.align.axes import Axis, Free, Product, Sum, groups_of

Tensors = Iterable[tuple[Axis, ...]]


def outer_groups(stored: Tensors, computed: Tensors, only: Collection[str] | None = None) -> dict[str, frozenset[str]]:
    """Find for each group the others in each of whose entries it may have an order of its own.

    That is so if every tensor that has channels of the group has them within the other one: as a coordinate next to
    it in all that is computed, and before it in the same product in all parameters, so that it can be written down.

    Args:
        stored: The axes of the parameters.
        computed: The axes of all that is computed.
        only: The groups that are asked for; by default all.
    """
    candidates: dict[str, frozenset[str]] = {}

    def meet(group: str, outer: frozenset[str]) -> None:
        if only is None or group in only:
            candidates[group] = candidates.get(group, outer) & outer - {group}

    for axes in stored:
        for axis in axes:
            for group, outer in occurrences(axis, frozenset()):
                meet(group, outer)
    for axes in computed:
        beside = Counter(group for axis in axes for group in direct_groups(axis))
        unique = frozenset(group for group, count in beside.items() if count == 1)
        for axis in axes:
            for group, outer in occurrences(axis, unique):
                meet(group, outer)
    return candidates


def direct_groups(axis: Axis) -> list[str]:
    """List the groups in which every entry along an axis has a coordinate."""
    factors = axis.factors if isinstance(axis, Product) else (axis,)
    return [factor.group for factor in factors if isinstance(factor, Free)]


def occurrences(axis: Axis, outer: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield every group along an axis, with those that stand outside it there."""
    if isinstance(axis, Free):
        yield axis.group, outer
    elif isinstance(axis, Sum):
        for part in axis.parts:
            yield from occurrences(part, outer)
    elif isinstance(axis, Product):
        for factor in axis.factors:
            yield from occurrences(factor, outer)
            outer = outer | frozenset(direct_groups(factor))


def outermost(candidates: dict[str, frozenset[str]], sizes: dict[str, int]) -> dict[str, str]:
    """Choose for each group the largest of its outer groups that are not within another one themselves."""
    chosen = {}
    for group, outer in candidates.items():
        roots = [other for other in outer if not candidates.get(other)]
        if roots:
            chosen[group] = max(roots, key=lambda other: (sizes[other], other))
    return chosen


def has_group(axes: Iterable[Axis]) -> bool:
    """Tell whether a group orders any of some axes."""
    return any(True for axis in axes for _ in groups_of(axis))
