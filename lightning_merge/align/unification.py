"""Unification of dimensions: factored by reshapes, cut by splits, made one by ties.

Structures that meet are refined until they agree; where they cannot agree, all entries are fixed in their places. That
loses symmetries, and never makes a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_merge.align.dimensions import (
    Dim,
    family,
    find,
    fixed,
    flat,
    free,
    freeze,
    index_of,
    member,
    product,
    reason,
    total,
)

ACROSS = "reshaped across channels"


def tie(dim: Dim, indices: Iterable[Dim] = ()) -> None:
    """Merge the members of the families along an axis whose index stands neither outside them nor in ``indices``."""
    dim, standing = find(dim), {find(index) for index in indices}
    if dim.kind == "family" and index_of(dim) not in standing:
        for other in dim.children[1:]:
            unify(dim.children[0], other)
        dim._same_as = find(dim.children[0])
        tie(dim, standing)
        return
    for child in list(dim.children):
        tie(child, standing)
        if dim.kind == "product":
            standing = standing | set(flat(child, "product"))


def factor(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Split an axis into factors, as ``unflatten`` does, the last one running fastest."""
    dim, wanted = find(dim), [size for size in sizes if size != 1]
    if len(wanted) < len(sizes):
        factors = iter(factor(dim, wanted) if wanted else ())
        return [Dim(1) if size == 1 else next(factors) for size in sizes]
    if len(sizes) == 1:
        return [dim]
    why = reason(dim)
    if why:
        return fixed(sizes, why)
    if dim.kind == "leaf":
        return dim.become("product", free(sizes))
    if dim.kind == "family":
        return _of_members(dim, [factor(child, sizes) for child in dim.children])
    if dim.kind == "sum":
        return _stacked(dim, sizes)
    remaining, pieces = flat(dim, "product"), []
    for size in sizes:
        taken: list[Dim] = []
        while size > 1:
            if remaining[0].size % size == 0 and remaining[0].size != size:
                remaining[:1] = factor(remaining[0], [size, remaining[0].size // size])
            if size % remaining[0].size:
                freeze(dim, ACROSS)
                return fixed(sizes, ACROSS)
            taken.append(remaining.pop(0))
            size //= taken[-1].size
        pieces.append(product(taken))
    return pieces


def _of_members(dim: Dim, pieces: Sequence[Sequence[Dim]]) -> list[Dim]:
    """Build the families of what the members of a family were split into."""
    return [family(index_of(dim), same) for same in zip(*pieces, strict=True)]


def _stacked(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Treat a sum of equal parts as a stack of them."""
    count, *inner = sizes
    boundary, boundaries = 0, set()
    for part in flat(dim, "sum"):
        boundary += part.size
        boundaries.add(boundary)
    if not boundaries.issuperset(range(dim.size // count, dim.size, dim.size // count)):
        freeze(dim, ACROSS)
        return fixed(sizes, ACROSS)
    (index,) = fixed([count], "a stack")
    members = [factor(part, inner) for part in cut(dim, [dim.size // count] * count)]
    return [index, *(family(index, same) for same in zip(*members, strict=True))]


def cut(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Cut an axis into parts that stand one behind the other, as ``torch.split`` does."""
    dim, wanted = find(dim), [size for size in sizes if size]
    if len(wanted) < len(sizes):
        parts = iter(cut(dim, wanted) if wanted else ())
        return [next(parts) if size else Dim(0, "no entry") for size in sizes]
    if len(sizes) == 1:
        return [dim]
    why = reason(dim)
    if why:
        return fixed(sizes, why)
    if dim.kind == "leaf":
        return dim.become("sum", free(sizes))
    if dim.kind == "family":
        return _of_members(dim, [cut(child, sizes) for child in dim.children])
    if dim.kind == "product":
        return _slices(dim, sizes)
    remaining, pieces = flat(dim, "sum"), []
    for size in sizes:
        taken: list[Dim] = []
        while size:
            if remaining[0].size > size:
                remaining[:1] = cut(remaining[0], [size, remaining[0].size - size])
            taken.append(remaining.pop(0))
            size -= taken[-1].size
        pieces.append(total(taken))
    return pieces


def _slices(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Cut a product along its outermost factor."""
    outer, *inner = flat(dim, "product")
    inside = dim.size // outer.size
    if any(size % inside for size in sizes):
        freeze(dim, ACROSS)
        return fixed(sizes, ACROSS)
    if set(sizes) == {inside}:
        freeze(outer, "a stack")
        return [product([member(factor, outer, entry) for factor in inner]) for entry in range(outer.size)]
    tie(product(inner))
    return [product([part, *inner]) for part in cut(outer, [size // inside for size in sizes])]


def unify(first: Dim, second: Dim) -> None:
    """Require that two axes are ordered alike."""
    first, second = find(first), find(second)
    if first is second:
        return
    if first.size != second.size:
        freeze(first, "sizes that differ")
        freeze(second, "sizes that differ")
        return
    if first.kind != "product" or second.kind != "product":
        stacked = first.kind == second.kind == "family" and index_of(first) is index_of(second)
        if not stacked:
            tie(first)
            tie(second)
            first, second = find(first), find(second)
    if first is second:
        return
    if "leaf" in (first.kind, second.kind):
        _absorb(first, second)
        return
    for one, other in _pairs(first, second):
        unify(one, other)
    first, second = find(first), find(second)
    if first.kind == second.kind:
        second._same_as = first


def _pairs(first: Dim, second: Dim) -> Sequence[tuple[Dim, Dim]]:
    """Pair the pieces of two axes that must be ordered alike if the axes are."""
    if first.kind == second.kind == "family":
        return list(zip(first.children, second.children, strict=True))
    if first.kind == second.kind:
        return _aligned(first, second, first.kind)
    parts, other = (first, second) if first.kind == "sum" else (second, first)
    pieces = flat(parts, "sum")
    return list(zip(pieces, cut(other, [piece.size for piece in pieces]), strict=True))


def _absorb(first: Dim, second: Dim) -> None:
    """Merge two axes of which one has no structure."""
    leaf, other = (first, second) if first.kind == "leaf" else (second, first)
    if leaf.fixed:
        freeze(other, leaf.fixed)
    leaf._same_as = other


def _aligned(first: Dim, second: Dim, kind: str) -> list[tuple[Dim, Dim]]:
    """Pair the pieces of two products, or two sums, refined until they have the same sizes."""
    ones, others, pairs = flat(first, kind), flat(second, kind), []
    while ones and others:
        swap = ones[0].size < others[0].size
        big, small = (others, ones) if swap else (ones, others)
        if big[0].size != small[0].size:
            divides = big[0].size % small[0].size == 0
            if kind == "product" and not divides:
                freeze(first, ACROSS)
                freeze(second, ACROSS)
                return []
            remainder = big[0].size // small[0].size if kind == "product" else big[0].size - small[0].size
            refine = factor if kind == "product" else cut
            big[:1] = refine(big[0], [small[0].size, remainder])
            continue
        pairs.append((ones.pop(0), others.pop(0)))
    return pairs
