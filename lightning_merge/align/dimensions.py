"""The axes of a traced module's tensors: which of them must be ordered alike.

Every axis of every tensor has a :class:`Dim`. Two axes that an operator ties to each other (the outputs of a layer and
the inputs of the next one) share one: they are merged as in union-find. A reshape factors a dimension into a
product, a concatenation or a split makes it a sum; two structures that meet are refined until they agree, and what
cannot agree is fixed in its place. What is still free in the end is a permutation group.

A third structure stands for tensors that hold several ones stacked, such as queries, keys and values of a fused
layer: ``reshape(batch, tokens, 3, heads, channels)``. Along the outer axis ``index`` the heads and channels may be
ordered differently for each of its entries: they are a *family* with one member an entry, which makes sense only in
tensors that have the axis ``index`` too. Wherever a family meets something else, its members are merged into one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence


class Dim:
    """An axis, shared by all tensors in which it must be ordered alike.

    Args:
        size: The number of entries.
        fixed: Why its entries must stay in their places; empty if they may move.
        kind: ``leaf``, ``product``, ``sum`` or ``family``.
        children: Factors (the last one runs fastest), parts, or members.
        index: For a family, the axis that has one entry for each member.
    """

    __slots__ = ("_same_as", "children", "fixed", "index", "kind", "size")

    def __init__(
        self,
        size: int,
        fixed: str = "",
        kind: str = "leaf",
        children: Iterable[Dim] = (),
        index: Dim | None = None,
    ) -> None:
        self.size, self.fixed, self.kind = size, "one entry" if size == 1 and kind == "leaf" else fixed, kind
        self.children, self.index = list(children), index
        self._same_as = self

    def become(self, kind: str, children: Iterable[Dim], index: Dim | None = None) -> list[Dim]:
        """Give a leaf a structure; return its children."""
        self.kind, self.children, self.index = kind, list(children), index
        return self.children


def find(dim: Dim) -> Dim:
    """Find the dimension that stands for all that were merged with this one."""
    while dim._same_as is not dim:
        dim._same_as = dim._same_as._same_as
        dim = dim._same_as
    return dim


def free(sizes: Iterable[int]) -> list[Dim]:
    """Make dimensions whose entries may move."""
    return [Dim(size) for size in sizes]


def fixed(sizes: Iterable[int], why: str) -> list[Dim]:
    """Make dimensions whose entries stay in their places, and note why."""
    return [Dim(size, why) for size in sizes]


def leaves(dim: Dim) -> Iterator[Dim]:
    """Yield the leaves of a dimension: itself, or those of its children."""
    dim = find(dim)
    if dim.kind == "leaf":
        yield dim
    for child in dim.children:
        yield from leaves(child)


def freeze(dim: Dim, why: str) -> None:
    """Fix all entries in their places."""
    for leaf in leaves(dim):
        leaf.fixed = leaf.fixed or why


def reason(dim: Dim) -> str:
    """Say why all entries are fixed; an empty string if some may move."""
    reasons = [leaf.fixed for leaf in leaves(dim)]
    return reasons[0] if all(reasons) else ""


def flat(dim: Dim, kind: str) -> list[Dim]:
    """List the factors of a product (or the parts of a sum), nested ones resolved, factors of one entry left out."""
    dim = find(dim)
    if dim.kind == kind:
        return [piece for child in dim.children for piece in flat(child, kind)]
    return [] if dim.size == 1 and kind == "product" else [dim]


def product(factors: Sequence[Dim]) -> Dim:
    """Build the axis that a reshape makes of several, the last one running fastest."""
    factors = [piece for factor in factors for piece in flat(factor, "product")]
    return _combined("product", factors, math.prod(factor.size for factor in factors))


def total(parts: Sequence[Dim]) -> Dim:
    """Build the axis that a concatenation makes of several."""
    return _combined("sum", [part for part in parts if part.size], sum(part.size for part in parts))


def _combined(kind: str, children: Sequence[Dim], size: int) -> Dim:
    if len(children) == 1:
        return find(children[0])
    reasons = [reason(child) for child in children]
    return Dim(size, max(reasons, default=""), kind="leaf") if all(reasons) else Dim(size, "", kind, children)


def family(index: Dim, members: Sequence[Dim]) -> Dim:
    """Build the axis that differs for each entry of another one."""
    if all(find(member) is find(members[0]) for member in members):
        return find(members[0])
    return Dim(members[0].size, "", "family", members, index)


def index_of(dim: Dim) -> Dim:
    """Find the axis for each of whose entries a family has a member."""
    assert dim.index is not None, "only families have an index"
    return find(dim.index)


def member(dim: Dim, index: Dim, entry: int) -> Dim:
    """Take the member of an axis at one entry of another one: itself where it is the same for all entries."""
    dim = find(dim)
    if dim.kind == "family" and index_of(dim) is find(index):
        return find(dim.children[entry])
    if dim.kind in ("product", "sum"):
        children = [member(child, index, entry) for child in dim.children]
        if any(new is not find(old) for new, old in zip(children, dim.children, strict=True)):
            return product(children) if dim.kind == "product" else total(children)
    return dim
