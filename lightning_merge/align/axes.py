"""Axes: the order of the entries along one dimension of a tensor, as permutation groups change it.

An axis is a small tree. The rows of a linear layer are one free group; the inputs of a layer behind a flattened
feature map are the product of the channels and fixed places; those behind a concatenation are a sum; the rows of a
query are the product of the heads and the channels within a head, which have an order of their own in every head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fixed:
    """Entries that stay where they are."""

    size: int


@dataclass(frozen=True)
class Free:
    """Entries that a permutation group orders.

    Args:
        group: The name of the group.
        size: The number of entries.
    """

    group: str
    size: int


@dataclass(frozen=True)
class Product:
    """Entries with one coordinate for each factor, the last one running fastest, as in ``x.reshape(a, b)``."""

    factors: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(factor.size for factor in self.factors)


@dataclass(frozen=True)
class Sum:
    """Entries that stand one part behind the other, as in ``torch.cat``."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """The number of entries."""
        return sum(part.size for part in self.parts)


Axis = Union[Fixed, Free, Product, Sum]  # noqa: UP007, it refers to itself
Orders = Mapping[str, Tensor]
"""For each group where its entries are taken from: ``(n,)``, or ``(outer, n)``, an order within each outer entry."""


def groups_of(axis: Axis) -> Iterator[str]:
    """Yield the groups along an axis, in their order."""
    if isinstance(axis, Free):
        yield axis.group
    for child in axis.factors if isinstance(axis, Product) else axis.parts if isinstance(axis, Sum) else ():
        yield from groups_of(child)


def sources(axis: Axis, orders: Orders, within: Mapping[str, str]) -> Tensor:
    """Compute where the entries along an axis are taken from: ``(size,)``, for ``index_select``.

    Args:
        axis: The axis.
        orders: The order of each group, ``(n,)`` or ``(outer, n)``; groups that are not in it stay as they are.
        within: For each group that has an order in every entry of another group: that other one, which must stand
            before it in the same product.
    """

    def steps(axis: Axis, count: int, targets: Mapping[str, Tensor]) -> Tensor:  # (count, size)
        if isinstance(axis, Sum):
            offset, parts = 0, []
            for part in axis.parts:
                parts.append(steps(part, count, targets) + offset)
                offset += part.size
            return torch.cat(parts, dim=1)
        if isinstance(axis, Product):
            places = torch.zeros(count, 1, dtype=torch.long)
            targets = dict(targets)
            for factor in axis.factors:
                width = places.shape[1]
                inner = steps(factor, count * width, targets)
                places = (places.reshape(-1, 1) * factor.size + inner).reshape(count, -1)
                targets = {group: target.repeat_interleave(factor.size) for group, target in targets.items()}
                if isinstance(factor, Free):
                    targets[factor.group] = torch.arange(factor.size).repeat(count * width)
            return places
        if isinstance(axis, Fixed) or axis.group not in orders:
            return torch.arange(axis.size).expand(count, -1)
        order = orders[axis.group]
        if order.dim() == 2:
            return order[targets[within[axis.group]]]
        return order.expand(count, -1)

    return steps(axis, 1, {})[0]


def coordinates(axis: Axis, group: str) -> Tensor:
    """Find the coordinate that each entry along an axis has in a group: ``(size,)``; -1 where it has none."""
    if isinstance(axis, Sum):
        return torch.cat([coordinates(part, group) for part in axis.parts])
    if isinstance(axis, Product):
        combined = torch.full((1,), -1)
        for factor in axis.factors:
            inner = coordinates(factor, group).expand(len(combined), -1)
            combined = torch.where(inner >= 0, inner, combined[:, None]).reshape(-1)
        return combined
    if isinstance(axis, Free) and axis.group == group:
        return torch.arange(axis.size)
    return torch.full((axis.size,), -1)
