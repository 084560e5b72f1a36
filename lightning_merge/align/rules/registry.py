"""The table of rules: what an operator does to the dimensions of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning_merge.align.dimensions import Dim, fixed, freeze
from lightning_merge.align.unification import unify

Dims = list[Dim]
Result = Sequence[Any]
"""The dimensions of the output, or those of each output."""


class Unsupported(Exception):
    """Use of an operator that its rule does not cover; all that it touches is fixed."""


@dataclass(frozen=True)
class Call:
    """Call of an operator.

    Args:
        arguments: Its arguments by the names in the operator's schema, with the dimensions of a tensor in its place.
        sizes: The sizes of its output, or of each of its outputs.
        separate: Called with an axis, and the dimensions of a tensor, before the axis is taken apart.
    """

    arguments: Mapping[str, Any]
    sizes: Sequence[Any]
    separate: Callable[[Dim, Dims], None]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def first(self) -> Any:
        """The first argument, whatever it is called."""
        return next(iter(self.arguments.values()))

    def axes(self, name: str, rank: int) -> list[int]:
        """Read an argument that names dimensions, all of them by default, counted from the front."""
        named = self[name]
        if named is None or named == []:
            return list(range(rank))
        return [axis % rank for axis in ([named] if isinstance(named, int) else named)]


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {}
R = TypeVar("R", bound=Rule)


def rule(*names: str) -> Callable[[R], R]:
    """Enter a function into the table, under names of operators such as ``linear`` or ``max.dim``."""

    def enter(function: R) -> R:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def tensors(arguments: Any) -> Iterator[Dims]:
    """Yield the dimensions of each tensor among the arguments of a call, or in its result."""
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, (list, tuple)):
        if all(isinstance(entry, Dim) for entry in arguments):
            yield list(arguments)
        else:
            for entry in arguments:
                yield from tensors(entry)


def broadcast(*operands: Sequence[Dim]) -> Dims:
    """Broadcast the dimensions of tensors; those that meet are ordered alike."""
    result: Dims = []
    for place in range(1, max(map(len, operands), default=0) + 1):
        meeting = [dims[-place] for dims in operands if len(dims) >= place]
        wide = [dim for dim in meeting if dim.size != 1] or meeting[:1]
        for other in wide[1:]:
            unify(wide[0], other)
        result.insert(0, wide[0])
    return result


def in_place(dims: Sequence[Dim], why: str) -> Dims:
    """Fix dimensions, and return them."""
    for dim in dims:
        freeze(dim, why)
    return list(dims)


def places(sizes: Sequence[int]) -> Dims:
    """Make dimensions of new places in space or time, which stay where they are."""
    return fixed(sizes, "places")
