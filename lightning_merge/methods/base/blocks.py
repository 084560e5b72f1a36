"""Task vectors in other coordinates than the parameters': what the method inside a wrapper surveys and merges."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.task_vectors import TaskVectors


class Blocks(TaskVectors):
    """Blocks that are computed from the parameters, one at a time, and look like parameters to a method.

    Args:
        task_vectors: Where the blocks come from: they take over its seed, and which names are no matrices.
        shapes: Every block's name, and its shape in one model.
        read: Computes the task tensors ``(T, …)`` of a block.
        read_base: Computes the base's block ``(…)``.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str], Tensor],
        read_base: Callable[[str], Tensor],
    ) -> None:
        self._names = tuple(shapes)
        self._shapes = shapes
        self._read = read
        self._read_base = read_base
        self.matrices = task_vectors.matrices.whole()
        self._seed = task_vectors._seed
        self._transform = None

    def __getitem__(self, name: str) -> Tensor:
        """The stacked differences of one block: ``(T, …)``."""
        deltas = self._read(name)
        return deltas if self._transform is None else self._transform(deltas, self.context(name))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The same as :meth:`items`: blocks are computed anew in any case."""
        return self.items()

    def only(self, name: str) -> Blocks:
        """The same task vectors with one block alone."""
        other = copy.copy(self)
        other._names = (name,)
        return other

    def factors(self, name: str) -> None:
        """No factors: blocks are dense."""
        return None

    def numel(self, name: str) -> int:
        """The number of entries of a block in one model."""
        return math.prod(self._shapes[name])

    def context(self, name: str, survey: Any = None) -> Context:
        """What a method's rule may know about a block."""
        seed = zlib.crc32(f"{self._seed}/{name}".encode())
        return Context(name, self._read_base(name), self.matrices, seed, survey)
