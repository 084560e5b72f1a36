"""Operators that move, join and take apart axes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_merge.align.dimensions import Dim, family, find, fixed, free, freeze, member, product, total
from lightning_merge.align.rules.registry import Call, Dims, Result, Unsupported, broadcast, in_place, places, rule
from lightning_merge.align.unification import cut, factor


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy", "reshape_as", "view_as")
def reshape(call: Call) -> Result:
    """Reshape a tensor; its entries keep their order."""
    return regroup(call.first, call.sizes)


def regroup(dims: Dims, sizes: Sequence[int]) -> Dims:
    """Regroup dimensions as a reshape does: what is joined becomes a product, what is split is factored."""
    if 0 in sizes:
        raise Unsupported
    old, new, regrouped = [dim for dim in dims if dim.size != 1], [size for size in sizes if size != 1], []
    while old:
        joined, split = [old.pop(0)], [new.pop(0)]
        have, want = joined[0].size, split[0]
        while have != want:
            if have < want:
                joined.append(old.pop(0))
                have *= joined[-1].size
            else:
                split.append(new.pop(0))
                want *= split[-1]
        regrouped += factor(product(joined), split)
    remaining = iter(regrouped)
    return [Dim(1) if size == 1 else next(remaining) for size in sizes]


@rule("permute", "permute_copy")
def permute(call: Call) -> Result:
    """Put axes into another order."""
    return [call.first[axis] for axis in call.axes("dims", len(call.first))]


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> Result:
    """Swap two axes."""
    one, other = (value for value in call.arguments.values() if isinstance(value, int))
    dims = list(call.first)
    dims[one], dims[other] = dims[other], dims[one]
    return dims


@rule("t", "numpy_T", "mT", "adjoint")
def transposed(call: Call) -> Result:
    """Swap the axes of a matrix."""
    *batch, rows, columns = call.first
    return [*batch, columns, rows]


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Result:
    """Move axes to other places."""
    dims, rank = call.first, len(call.first)
    goal = dict(zip(call.axes("destination", rank), call.axes("source", rank), strict=True))
    unmoved = iter(axis for axis in range(rank) if axis not in goal.values())
    return [dims[goal[place] if place in goal else next(unmoved)] for place in range(rank)]


@rule("unsqueeze")
def unsqueeze(call: Call) -> Result:
    """Insert an axis of one entry."""
    (axis,) = call.axes("dim", len(call.first) + 1)
    return _kept(call.first, axis)


@rule("squeeze")
def squeeze(call: Call) -> Result:
    """Drop axes of one entry."""
    dropped = call.axes("dim", len(call.first))
    return [dim for axis, dim in enumerate(call.first) if axis not in dropped or dim.size != 1]


@rule("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(call: Call) -> Result:
    """Copy entries along an axis; the copies are equal, so that they may be in any order."""
    dims = [*(Dim(1) for _ in range(len(call.sizes) - len(call.first))), *call.first]
    return [dim if dim.size == size else Dim(size) for dim, size in zip(dims, call.sizes, strict=True)]


@rule("repeat", "tile")
def repeat(call: Call) -> Result:
    """Repeat a tensor, one copy behind the other."""
    dims = [*(Dim(1) for _ in range(len(call.sizes) - len(call.first))), *call.first]
    return [product([Dim(size // dim.size), dim]) for dim, size in zip(dims, call.sizes, strict=True)]


@rule("repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Result:
    """Repeat every entry next to itself."""
    if call["dim"] is None:
        raise Unsupported
    return [product([dim, Dim(size // dim.size)]) for dim, size in zip(call.first, call.sizes, strict=True)]


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Result:
    """Concatenate tensors along an axis."""
    inputs: list[Dims] = call.first
    (axis,) = call.axes("dim", len(call.sizes))
    if any(len(dims) != len(call.sizes) for dims in inputs):
        raise Unsupported
    joined = total([dims[axis] for dims in inputs])
    return [
        joined if place == axis else broadcast(*([dims[place]] for dims in inputs))[0]
        for place in range(len(call.sizes))
    ]


@rule("stack")
def stack(call: Call) -> Result:
    """Stack tensors along a new axis: every other axis becomes a family."""
    (axis,) = call.axes("dim", len(call.sizes))
    (index,) = fixed([len(call.first)], "a stack")
    dims = [family(index, same) for same in zip(*call.first, strict=True)]
    return [*dims[:axis], index, *dims[axis:]]


def entry(call: Call, dims: Dims, axis: int, place: int) -> Dims:
    """Take a tensor at one entry of an axis; that entry does not move."""
    index = find(dims[axis])
    call.separate(index, dims)
    if not index.fixed and index.size > 1:
        freeze(cut(index, [place, 1, index.size - place - 1])[1], "one entry")
    return [member(dim, index, place) for dim in [*dims[:axis], *dims[axis + 1 :]]]


def _kept(dims: Dims, axis: int) -> Dims:
    return [*dims[:axis], Dim(1), *dims[axis:]]


@rule("select", "select_copy")
def select(call: Call) -> Result:
    """Take one entry along an axis."""
    (axis,) = call.axes("dim", len(call.first))
    return entry(call, call.first, axis, call["index"] % call.first[axis].size)


@rule("unbind", "unbind_copy")
def unbind(call: Call) -> Result:
    """Take every entry along an axis by itself."""
    (axis,) = call.axes("dim", len(call.first))
    return [entry(call, call.first, axis, place) for place in range(len(call.sizes))]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "split_copy", "split_with_sizes_copy")
def split(call: Call) -> Result:
    """Split a tensor along an axis."""
    dims, (axis,) = call.first, call.axes("dim", len(call.first))
    sizes = [part[axis] for part in call.sizes]
    if set(sizes) == {1}:
        return [_kept(entry(call, dims, axis, place), axis) for place in range(len(sizes))]
    return [[*dims[:axis], part, *dims[axis + 1 :]] for part in cut(dims[axis], sizes)]


@rule("slice", "narrow", "slice_copy")
def slice_(call: Call) -> Result:
    """Take a range along an axis."""
    dims, (axis,) = list(call.first), call.axes("dim", len(call.first)) if call["dim"] is not None else (0,)
    size, length = dims[axis].size, call.sizes[axis]
    if call["step"] not in (None, 1):
        freeze(dims[axis], "every n-th entry")
        dims[axis] = places([length])[0]
        return dims
    start = min(call["start"] or 0, size)
    start = max(start + size, 0) if start < 0 else start
    if length == 1:
        return _kept(entry(call, dims, axis, start), axis)
    dims[axis] = cut(dims[axis], [start, length, size - start - length])[1]
    return dims


@rule("index", "_unsafe_index")
def index(call: Call) -> Result:
    """Take numbered entries along some axes."""
    dims, indices = call.first, call["indices"]
    axes = [axis for axis, numbers in enumerate(indices) if numbers is not None]
    if axes != list(range(axes[0], axes[-1] + 1)):
        raise Unsupported
    in_place([dims[axis] for axis in axes], "entries of a table")
    return [*dims[: axes[0]], *broadcast(*(indices[axis] for axis in axes)), *dims[axes[-1] + 1 :]]


@rule("index_select")
def index_select(call: Call) -> Result:
    """Take numbered entries along one axis."""
    dims, (axis,) = call.first, call.axes("dim", len(call.first))
    freeze(dims[axis], "entries of a table")
    return [*dims[:axis], *places([call.sizes[axis]]), *dims[axis + 1 :]]


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Result:
    """Add entries at the ends of the last axes: constants, in any order, or copies of others."""
    dims, widths = list(call.first), call["pad"]
    constant = call["mode"] in (None, "constant")
    for axis, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True), 1):
        if (before, after) != (0, 0):
            if not constant or min(before, after) < 0:
                freeze(dims[-axis], "places")
                dims[-axis] = places([call.sizes[-axis]])[0]
            else:
                dims[-axis] = total([*free([before]), dims[-axis], *free([after])])
    return dims


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def shuffle(call: Call) -> Result:
    """Turn channels into places, or places into channels, or swap channels with their groups."""
    dims = call.first
    if call["groups"] is not None:
        outer, inner = factor(dims[1], [call["groups"], dims[1].size // call["groups"]])
        return [dims[0], product([inner, outer]), *dims[2:]]
    *batch, channels, height, width = dims
    in_place([height, width], "places")
    few, many = sorted([call.sizes[-3], channels.size])
    kept = factor(channels, [few, many // few])[0] if channels.size == many else channels
    if channels.size == many:
        freeze(factor(channels, [few, many // few])[1], "places")
        return [*batch, kept, *places(call.sizes[-2:])]
    return [*batch, product([kept, *places([many // few])]), *places(call.sizes[-2:])]
