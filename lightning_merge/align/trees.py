"""Dimensions as the axes of named groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lightning_merge.align.axes import Axis, Fixed, Free, Product, Sum
from lightning_merge.align.dimensions import Dim, find, flat, member


class Dependent(Exception):
    """Order along an axis that depends on the place along another one: no tree can express that."""


def tree(dim: Dim, names: Mapping[Dim, str]) -> Axis:
    """Express a dimension as an axis of named groups; what has no name is fixed."""
    dim = find(dim)
    if dim.kind == "leaf":
        return Free(names[dim], dim.size) if dim in names else Fixed(dim.size)
    if dim.kind == "family":
        raise Dependent
    if dim.kind == "sum":
        return _joined(Sum, [tree(part, names) for part in flat(dim, "sum")])
    factors = flat(dim, "product")
    for place, factor in enumerate(factors):
        inner = factors[place + 1 :]
        parts = [[member(dim, factor, entry) for dim in inner] for entry in range(factor.size if factor.fixed else 0)]
        if parts and any(new is not find(old) for new, old in zip(parts[0], inner, strict=True)):
            alternatives = _joined(Sum, [_joined(Product, [tree(dim, names) for dim in part]) for part in parts])
            return _joined(Product, [*(tree(dim, names) for dim in factors[:place]), alternatives])
    return _joined(Product, [tree(factor, names) for factor in factors])


def _joined(kind: type[Product] | type[Sum], axes: Iterable[Axis]) -> Axis:
    """Build a product or a sum, with those within it resolved and fixed neighbours joined."""
    pieces: list[Axis] = []
    for axis in axes:
        for piece in (axis.factors if isinstance(axis, Product) else axis.parts) if isinstance(axis, kind) else (axis,):
            if pieces and isinstance(piece, Fixed) and isinstance(pieces[-1], Fixed):
                pieces[-1] = Fixed(kind((pieces[-1], piece)).size)
            elif kind is Sum or piece.size != 1:
                pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else kind(tuple(pieces)) if pieces else Fixed(1)


def each_member(dims: Sequence[Dim]) -> Iterator[Sequence[Dim]]:
    """Yield a tensor, or for a stack with families the tensors that are stacked."""
    index = next((node.index for dim in dims for node in _nodes(dim) if node.kind == "family"), None)
    if index is None:
        yield dims
        return
    for entry in range(index.size):
        yield from each_member([member(dim, index, entry) for dim in dims])


def _nodes(dim: Dim) -> Iterator[Dim]:
    dim = find(dim)
    yield dim
    for child in dim.children:
        yield from _nodes(child)
