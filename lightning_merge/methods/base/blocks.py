"""Task vectors in other coordinates than the parameters': what the method inside a wrapper surveys and merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.task_vectors import TaskVectors


class Blocks(TaskVectors):
    """Blocks that are computed from the parameters, one at a time, and look like parameters to a method.

    Args:
        source: Where the blocks come from: they take over its seed, and which names are no matrices.
        shapes: Every block's name, and its shape ``(…)`` in one model.
        read: Computes the task tensors ``(T, …)`` of a block.
        read_base: Computes the base's block ``(…)``.
    """

    def __init__(
        self,
        source: TaskVectors,
        shapes: Mapping[str, Sequence[int]],
        read: Callable[[str], Tensor],
        read_base: Callable[[str], Tensor],
    ) -> None:
        super().__init__(shapes, source.matrices.whole(), source.seed)
        self._source = source
        self._shapes = shapes
        self._read = read
        self._read_base = read_base

    @property
    def num_experts(self) -> int:
        """The number of experts, T."""
        return self._source.num_experts

    def __getitem__(self, name: str) -> Tensor:
        """Compute the task tensors of one block: ``(T, …)``."""
        return self._read(name)

    def shape(self, name: str) -> torch.Size:
        """Return the shape ``(…)`` of a block in one model."""
        return torch.Size(self._shapes[name])

    def context(self, name: str, survey: Any = None) -> Context:
        """Build the context of a block for a method's rule."""
        return Context(name, self._read_base(name), self.matrices, self.seed_of(name), survey)

    def only(self, name: str) -> Blocks:
        """Restrict the task vectors to one block."""
        return Blocks(self._source, {name: self._shapes[name]}, self._read, self._read_base)
