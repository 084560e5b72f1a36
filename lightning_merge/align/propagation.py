"""Follow the axes of a module's parameters through its graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_merge.align.axes import Axis
from lightning_merge.align.dimensions import Dim, fixed, flat, free, freeze, leaves, reason
from lightning_merge.align.nesting import outer_groups
from lightning_merge.align.rules import RULES, Call, Dims, Unsupported, elementwise, tensors
from lightning_merge.align.tracing import SITE
from lightning_merge.align.trees import each_member, tree
from lightning_merge.align.unification import tie


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
    unknown: set[str] = field(default_factory=set)

    def run(self, program: ExportedProgram) -> Propagation:
        """Follow the dimensions through a graph, from its inputs to its outputs."""
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
            name = name or signature.inputs_to_lifted_tensor_constants.get(node.name)
            constant = program.constants.get(name)
            return frozen(node, "the inputs") if not isinstance(constant, Tensor) else _constant(constant)
        same = [other for other, tensor in self.owners.items() if tensor is self.owners[name]]
        if name not in self.stored and node.users:
            parameter = node.name in signature.inputs_to_parameters
            statistic = not parameter and _is_statistic(node)
            dims = free(self.owners[name].shape) if parameter or statistic else frozen(node, "buffers")
            if self.immovable.intersection(same):
                _freeze_all(dims, "as asked")
            self.stored.update(dict.fromkeys(same, dims))
            self.statistics.update(same if statistic else ())
        return self.stored.get(name) or frozen(node, "unused")

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args: tuple[Any, ...] = fx.map_arg(node.args, values.__getitem__)
        kwargs: Mapping[str, Any] = fx.map_arg(node.kwargs, values.__getitem__)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if node.target is SITE:
            dims, name = args
            self.sites[name] = dims
            return dims
        sizes = pytree.tree_map_only(Tensor, lambda tensor: list(tensor.shape), node.meta.get("val"))
        if sizes is None and "_assert" in str(node.target):
            return None
        rule = _rule(node.target)
        try:
            if rule is None or not all(isinstance(size, int) for size in pytree.tree_leaves(sizes)):
                raise Unsupported
            result = rule(Call(_bound(node.target, args, kwargs), sizes, self.separate))
            if [[dim.size for dim in dims] for dims in tensors(result)] != _each(sizes):
                raise Unsupported
            return result
        except (Unsupported, ArithmeticError, LookupError, TypeError, ValueError):  # a form that the rule does not know
            operator_ = str(node.target)
            for dims in tensors((args, kwargs)):
                self.unknown.update({operator_} if any(not reason(dim) for dim in dims) else ())
                _freeze_all(dims, operator_)
            return frozen(node, operator_ if node.all_input_nodes else "constants")

    def separate(self, index: Dim, dims: Dims) -> None:
        """Give axes of a stack an order of their own at each entry of the stack's axis, if nothing has tied them yet.

        Args:
            index: The axis along which the tensor is taken apart.
            dims: The dimensions of the tensor.
        """
        movable = dict.fromkeys(leaf for dim in dims for leaf in leaves(dim) if not leaf.fixed)
        if index not in movable:
            return
        names = {leaf: str(number) for number, leaf in enumerate(movable)}
        outer = outer_groups(*self.trees(names))
        apart = [leaf for leaf in movable if names[index] in outer[names[leaf]]]
        if apart:
            freeze(index, "a stack")
        for leaf in apart:
            leaf.become("family", free([leaf.size] * index.size), index)

    def free_leaves(self) -> list[Dim]:
        """List the leaves of the parameters that may be permuted, in the order of the parameters."""
        movable: dict[Dim, None] = {}
        for name in self.owners:
            for dim in self.stored.get(name, ()):
                movable.update(dict.fromkeys(leaf for leaf in leaves(dim) if not leaf.fixed))
        return list(movable)

    def trees(self, names: Mapping[Dim, str]) -> tuple[set[tuple[Axis, ...]], set[tuple[Axis, ...]]]:
        """Express all parameters, and all that is computed from them, by the axes of named groups."""
        stored = {tuple(tree(dim, names) for dim in dims) for dims in self.stored.values()}
        computed = {tuple(tree(dim, names) for dim in dims) for seen in self.computed for dims in each_member(seen)}
        return stored, computed


def settle(dims: Dims) -> Dims:
    """Merge the members of families in a tensor that does not have the axis along which they differ."""
    indices = [factor for dim in dims for factor in flat(dim, "product")]
    for dim in dims:
        tie(dim, indices)
    return dims


def _freeze_all(dims: Iterable[Dim], why: str) -> None:
    for dim in dims:
        freeze(dim, why)


def frozen(node: fx.Node, why: str) -> Any:
    """Make dimensions that stay as they are for the output of a node, or for each of its outputs."""
    return pytree.tree_map_only(Tensor, lambda tensor: fixed(map(int, tensor.shape), why), node.meta.get("val"))


def _constant(tensor: Tensor) -> Dims:
    """Make the dimensions of a tensor ``(…)`` that is no parameter: axes along which all is equal may be permuted."""
    equal = [bool((tensor == tensor.narrow(axis, 0, 1)).all()) for axis in range(tensor.dim() if tensor.numel() else 0)]
    return [Dim(size, "" if same else "constants") for size, same in zip(tensor.shape, equal, strict=True)]


def _each(sizes: Any) -> list[Any]:
    """List the sizes of each output."""
    if sizes is None or all(isinstance(size, int) for size in sizes):
        return [] if sizes is None else [sizes]
    return [size for part in sizes for size in _each(part)]


def _rule(target: Any) -> Any:
    """Look up the rule of an operator such as ``aten.add_.Tensor``."""
    namespace, _, operation = str(target).partition(".")
    if namespace != "aten":
        return None
    name = operation.split(".")[0].rstrip("_")
    if operation in RULES:
        return RULES[operation]
    return elementwise.elementwise if torch.Tag.pointwise in target.tags else RULES.get(name)


def _bound(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Bind the arguments of a call to the names in its operator's schema."""
    schema = target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    named = dict(zip((argument.name for argument in schema), args, strict=False))
    return {argument.name: {**defaults, **named, **kwargs}.get(argument.name) for argument in schema}


def _is_statistic(node: fx.Node) -> bool:
    """Tell whether a buffer is a running mean or variance."""
    return all("batch_norm" in str(user.target) for user in node.users)
