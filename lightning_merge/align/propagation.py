"""Follow the axes of a module's parameters through its graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_merge.align.axes import Axis, Fixed, Free, Product, Sum
from lightning_merge.align.dimensions import Dim, find, fixed, flat, free, freeze, leaves, member, tie
from lightning_merge.align.nesting import outer_groups
from lightning_merge.align.rules import RULES, Call, Dims, Unsupported, elementwise, tensors
from lightning_merge.align.tracing import SITE


@dataclass
class Propagation:
    """The dimensions of all tensors of a graph.

    Args:
        owners: The parameters and buffers by name; tied ones are the same tensor, and get the same dimensions.
        immovable: The names of parameters whose entries stay where they are.
    """

    owners: Mapping[str, Tensor]
    immovable: frozenset[str] = frozenset()
    stored: dict[str, Dims] = field(default_factory=dict)
    statistics: set[str] = field(default_factory=set)
    sites: dict[str, Dims] = field(default_factory=dict)
    computed: list[Dims] = field(default_factory=list)

    def run(self, program: ExportedProgram) -> Propagation:
        """Go through a graph from its inputs to its outputs."""
        values: dict[fx.Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._placeholder(node, program)
            elif node.op == "call_function":
                values[node] = self._call(node, values)
                self.computed += map(settle, tensors(values[node]))
            elif node.op == "output":
                for dims in tensors(fx.map_arg(node.args[0], values.get)):
                    _freeze_all(dims, "the outputs")
        return self

    def _placeholder(self, node: fx.Node, program: ExportedProgram) -> Any:
        signature = program.graph_signature
        name = signature.inputs_to_parameters.get(node.name) or signature.inputs_to_buffers.get(node.name)
        if name is None or name not in self.owners:
            return frozen(node, "the inputs" if node.name in signature.user_inputs else "constants")
        same = [other for other, tensor in self.owners.items() if tensor is self.owners[name]]
        if name not in self.stored and node.users:
            statistic = _is_statistic(node)
            movable = node.name in signature.inputs_to_parameters or statistic
            dims = free(self.owners[name].shape) if movable else frozen(node, "buffers")
            if self.immovable.intersection(same):
                _freeze_all(dims, "as asked")
            self.stored.update(dict.fromkeys(same, dims))
            self.statistics.update(same if statistic else ())
        return self.stored.get(name) or frozen(node, "unused")

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: values[used])
        if node.target is operator.getitem:
            return args[0][args[1]]
        if node.target is SITE:
            dims, name = args
            self.sites[name] = dims
            return dims
        sizes = pytree.tree_map_only(Tensor, lambda tensor: list(tensor.shape), node.meta.get("val"))
        rule = _rule(node.target)
        try:
            if rule is None or not all(isinstance(size, int) for size in pytree.tree_leaves(sizes)):
                raise Unsupported
            found = rule(Call(_bound(node.target, args, kwargs), sizes, self.separate))
            if [[dim.size for dim in dims] for dims in tensors(found)] != _each(sizes):
                raise Unsupported
            return found
        except Unsupported:
            reason = "constants" if not node.all_input_nodes else str(node.target)
            for dims in tensors((args, kwargs)):
                _freeze_all(dims, reason)
            return frozen(node, reason)

    def separate(self, index: Dim, dims: Dims) -> None:
        """Give axes of a stack an order of their own at each entry of the stack's axis, if nothing has tied them yet.

        Args:
            index: The axis along which the tensor is taken apart.
            dims: The dimensions of the tensor.
        """
        names = {leaf: str(number) for number, leaf in enumerate(self.free_leaves())}
        if index not in names:
            return
        inner = {leaf for dim in dims for leaf in leaves(dim) if leaf in names}
        outer = outer_groups(*self.trees(names), only={names[leaf] for leaf in inner})
        apart = [leaf for leaf in inner if names[index] in outer[names[leaf]]]
        if apart:
            freeze(index, "a stack")
        for leaf in apart:
            leaf.become("family", free([leaf.size] * index.size), index)

    def free_leaves(self) -> list[Dim]:
        """What may be ordered in the parameters, in the order of their names."""
        found: dict[Dim, None] = {}
        for name in self.owners:
            for dim in self.stored.get(name, ()):
                found.update(dict.fromkeys(leaf for leaf in leaves(dim) if not leaf.fixed))
        return list(found)

    def trees(self, names: Mapping[Dim, str]) -> tuple[set[tuple[Axis, ...]], set[tuple[Axis, ...]]]:
        """The axes of all parameters, and of all that is computed from them."""
        stored = {tuple(tree(dim, names) for dim in dims) for dims in self.stored.values()}
        computed = {tuple(tree(dim, names) for dim in dims) for seen in self.computed for dims in each_member(seen)}
        return stored, computed


def tree(dim: Dim, names: Mapping[Dim, str]) -> Axis:
    """A dimension as an axis of named groups; what has no name is fixed."""
    dim = find(dim)
    if dim.kind == "leaf":
        return Free(names[dim], dim.size) if dim in names else Fixed(dim.size)
    if dim.kind == "family":
        raise Unsupported
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
    """A product or a sum, with those within it resolved and fixed neighbours joined."""
    found: list[Axis] = []
    for axis in axes:
        for piece in (axis.factors if isinstance(axis, Product) else axis.parts) if isinstance(axis, kind) else (axis,):
            if found and isinstance(piece, Fixed) and isinstance(found[-1], Fixed):
                found[-1] = Fixed(kind((found[-1], piece)).size)
            elif kind is Sum or piece.size != 1:
                found.append(piece)
    return found[0] if len(found) == 1 else kind(tuple(found)) if found else Fixed(1)


def each_member(dims: Dims) -> Iterator[Dims]:
    """A tensor, or for a stack with families the tensors that are stacked."""
    index = next((node.index for dim in dims for node in _nodes(dim) if node.kind == "family"), None)
    if index is None:
        yield dims
        return
    for entry in range(index.size):
        yield from each_member([member(dim, index, entry) for dim in dims])


def settle(dims: Dims) -> Dims:
    """Merge the members of families in a tensor that does not have the axis along which they differ."""
    indices = [factor for dim in dims for factor in flat(dim, "product")]
    for dim in dims:
        tie(dim, indices)
    return dims


def _nodes(dim: Dim) -> Iterator[Dim]:
    dim = find(dim)
    yield dim
    for child in dim.children:
        yield from _nodes(child)


def _freeze_all(dims: Iterable[Dim], reason: str) -> None:
    for dim in dims:
        freeze(dim, reason)


def frozen(node: fx.Node, reason: str) -> Any:
    """Dimensions of their own for the output of a node, or each of them, that stay as they are."""
    return pytree.tree_map_only(Tensor, lambda tensor: fixed(map(int, tensor.shape), reason), node.meta.get("val"))


def _each(sizes: Any) -> list[Any]:
    """The sizes of every output."""
    if sizes is None or all(isinstance(size, int) for size in sizes):
        return [] if sizes is None else [sizes]
    return [size for part in sizes for size in _each(part)]


def _rule(target: Any) -> Any:
    """The rule of an operator such as ``aten.add_.Tensor``."""
    namespace, _, operation = str(target).partition(".")
    if namespace != "aten":
        return None
    name = operation.split(".")[0].rstrip("_")
    if operation in RULES:
        return RULES[operation]
    return elementwise.elementwise if torch.Tag.pointwise in target.tags else RULES.get(name)


def _bound(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    schema = target._schema.arguments
    found = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    named = dict(zip((argument.name for argument in schema), args, strict=False))
    return {argument.name: {**found, **named, **kwargs}.get(argument.name) for argument in schema}


def _is_statistic(node: fx.Node) -> bool:
    """Whether a buffer is a running mean or variance."""
    return all("batch_norm" in str(user.target) for user in node.users)
