"""Permutation symmetries of a model: channels that may be reordered without changing what it computes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_merge.align.axes import Axis, Fixed, Free, Product, Sum, groups_of
from lightning_merge.checkpoints.names import matches
from lightning_merge.utilities.errors import MergeError, raise_all
from lightning_merge.utilities.nested import check_expanded
from lightning_merge.utilities.schemas import Count, check_schema, load_json, shown


@dataclass(frozen=True)
class Group:
    """Channels that may be put into any order, as long as it is the same one wherever they occur.

    Args:
        name: The name of the group.
        size: The number of channels.
        within: Another group in each of whose entries these channels have an order of their own: the heads, for the
            channels within a head. It is not within another one itself.
    """

    name: str
    size: int
    within: str | None = None


class _Free(TypedDict):
    group: str


class _Product(TypedDict):
    product: list[int | _Free | _Product | _Sum]


class _Sum(TypedDict):
    sum: list[int | _Free | _Product | _Sum]


class _Size(TypedDict):
    size: Count


class _Group(_Size, total=False):
    within: str | None


class _Axes(TypedDict):
    groups: dict[str, _Group]
    axes: dict[str, list[int | _Free | _Product | _Sum]]


class _Plain(_Axes, total=False):
    features: dict[str, list[int | _Free | _Product | _Sum]]
    statistics: list[str]
    fixed: dict[str, int]


@dataclass(frozen=True)
class Symmetries:
    """The permutation groups of a model, and where their channels occur.

    Args:
        groups: The groups by name.
        axes: For every parameter and buffer that a group orders, its axes.
        features: The same for activations, by the name of their site, see
            :class:`lightning_merge.utilities.sites.Site`. The first axis, that of the samples, is ``Fixed(-1)``: any
            number of them.
        statistics: Names of what is permuted with the rest, but not compared: running means and variances.
        fixed: What keeps channels from being permuted: the number of axes by operator or reason.
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis, ...]]
    features: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)
    statistics: frozenset[str] = frozenset()
    fixed: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_axes(
        cls,
        axes: Mapping[str, Sequence[str | None]],
        shapes: Mapping[str, Sequence[int]],
        statistics: Iterable[str] = (),
    ) -> Symmetries:
        """Build the groups from a specification that was written by hand, such as git-re-basin's ``axes_to_perm``.

        Args:
            axes: For every parameter the name of the group of each of its axes, or None.
            shapes: The shapes of the parameters.
            statistics: Buffers that are permuted but not compared.

        Raises:
            MergeError: If a parameter has other axes, or a group several sizes.
        """
        problems: list[str] = []
        sizes: dict[str, int] = {}
        ordered: dict[str, tuple[Axis, ...]] = {}
        for name, groups in axes.items():
            shape = tuple(shapes[name]) if name in shapes else None
            if shape is None or len(shape) != len(groups):
                what = "does not exist" if shape is None else f"has {len(shape)} axes, not {len(groups)}"
                problems.append(f"The specification names {name!r}, which {what}.")
                continue
            for group, size in zip(groups, shape, strict=True):
                if group is not None and sizes.setdefault(group, size) != size:
                    problems.append(f"The group {group!r} has {sizes[group]} channels, but {size} in {name!r}.")
            ordered[name] = tuple(
                Fixed(size) if group is None else Free(group, size) for group, size in zip(groups, shape, strict=True)
            )
        raise_all(problems)
        return cls({name: Group(name, size) for name, size in sizes.items()}, ordered, statistics=frozenset(statistics))

    @property
    def within(self) -> dict[str, str]:
        """For every group that is within another one: that one."""
        return {group.name: group.within for group in self.groups.values() if group.within is not None}

    def children(self, group: str) -> list[str]:
        """List the groups that are within this one."""
        return [name for name, outer in self.within.items() if outer == group]

    def occurrences(self, group: str) -> list[tuple[str, int]]:
        """List the parameters and axes along which a group occurs, those of statistics left out."""
        return [
            (name, dim)
            for name, axes in self.axes.items()
            if name not in self.statistics
            for dim, axis in enumerate(axes)
            if group in groups_of(axis)
        ]

    def check(self, weights: Mapping[str, Tensor], name: str) -> None:
        """Raise a :class:`MergeError` unless a model has all the axes that are ordered here, in their sizes.

        Axes that nothing orders may differ: a head may have other classes.
        """
        meta = getattr(weights, "meta", weights)
        problems = []
        for parameter, axes in self.axes.items():
            shape = tuple(meta[parameter].shape) if parameter in meta else None
            if shape is None:
                problems.append(f"{name} lacks {parameter!r} of the model whose channels are aligned.")
            elif len(shape) != len(axes) or any(
                size != axis.size for size, axis in zip(shape, axes, strict=True) if any(groups_of(axis))
            ):
                problems.append(
                    f"{parameter!r} has shape {shape} in {name} and {tuple(axis.size for axis in axes)} in the model "
                    "whose channels are aligned; only models of one architecture can be aligned."
                )
        raise_all(problems)

    def ignoring(self, patterns: Iterable[str]) -> Symmetries:
        """Leave some parameters (heads) out of comparisons of models; the groups are the same.

        Args:
            patterns: Shell patterns of names. What they match is permuted with the rest, but not compared.
        """
        patterns = list(patterns)
        ignored = {name for name in self.axes if matches(name, patterns)}
        return replace(self, statistics=self.statistics | ignored)

    def to_json(self) -> str:
        """Write the groups and axes as text, which :meth:`from_json` reads."""

        def plain(axis: Axis) -> Any:
            if isinstance(axis, Fixed):
                return axis.size
            if isinstance(axis, Free):
                return {"group": axis.group}
            if isinstance(axis, Product):
                return {"product": [plain(factor) for factor in axis.factors]}
            return {"sum": [plain(part) for part in axis.parts]}

        def table(axes: Mapping[str, tuple[Axis, ...]]) -> dict[str, list[Any]]:
            return {name: [plain(axis) for axis in along] for name, along in axes.items()}

        content = {
            "groups": {group.name: {"size": group.size, "within": group.within} for group in self.groups.values()},
            "axes": table(self.axes),
            "features": table(self.features),
            "statistics": sorted(self.statistics),
            "fixed": dict(self.fixed),
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Symmetries:
        """Read what :meth:`to_json` writes.

        Raises:
            MergeError: If it is something else.
        """
        what, remedy = "This is no specification of permutation groups", "write it anew with `lightning-merge align`"
        try:
            content = load_json(text)
            check_expanded(f"{what}: it", content)
            check_schema(content, _Plain, what, remedy)
            groups = {name: Group(name, of["size"], of.get("within")) for name, of in content["groups"].items()}
            if unknown := [group.name for group in groups.values() if group.within not in (None, *groups)]:
                raise MergeError(f"{what}: {shown(unknown[0])} is within a group that it does not name; {remedy}.")

            def tree(plain: Any) -> Axis:
                if isinstance(plain, int):
                    return Fixed(plain)
                if "group" in plain:
                    return Free(plain["group"], groups[plain["group"]].size)
                if "product" in plain:
                    return Product(tuple(map(tree, plain["product"])))
                return Sum(tuple(map(tree, plain["sum"])))

            def table(axes: Mapping[str, list[Any]]) -> dict[str, tuple[Axis, ...]]:
                return {name: tuple(map(tree, along)) for name, along in axes.items()}

            return cls(
                groups,
                table(content["axes"]),
                table(content.get("features", {})),
                frozenset(content.get("statistics", ())),
                content.get("fixed", {}),
            )
        except MergeError:
            raise
        except ValueError as error:
            raise MergeError(f"{what}: {error}; {remedy}.") from error
        except KeyError as error:
            raise MergeError(f"{what}: it does not say how large the group {error} is; {remedy}.") from error

    def order_shape(self, group: str) -> tuple[int, ...]:
        """Return the shape of a group's part of a permutation: ``(n,)``, or ``(outer, n)`` within another group."""
        size, within = self.groups[group].size, self.groups[group].within
        return (size,) if within is None else (self.groups[within].size, size)

    def identity_order(self, group: str) -> Tensor:
        """Make the order of a group in which nothing moves: ``(n,)``, or ``(outer, n)`` within another group."""
        return torch.arange(self.groups[group].size).expand(self.order_shape(group)).clone()
