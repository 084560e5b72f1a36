"""Wrappers whose method inside merges in other coordinates than the parameters' own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.wrapper import Wrapper

Rule = Callable[[Tensor, Context], Tensor]
"""A rule that merges a block, given what is known of it: ``(T, …) -> (…)``."""


@dataclass(frozen=True)
class CoordinateWrapper(Wrapper):
    """A wrapper that finds coordinates in its survey, lets the method inside merge in them, and comes back.

    A subclass overrides :meth:`survey`, where the method inside surveys the
    :class:`lightning_merge.methods.base.blocks.Blocks`, and :meth:`merge_coordinates`.

    Args:
        method: The method inside, which sees the coordinates as its parameters.
        scale: Scaling coefficient of the update; by default that of the method inside.
    """

    dtype: ClassVar[torch.dtype] = torch.float64  # to factorize

    @abstractmethod
    def merge_coordinates(self, deltas: Tensor, context: Context, rule: Rule) -> Tensor:
        """Merge a parameter by a rule for its coordinates: ``(T, …) -> (…)``.

        Args:
            deltas: The task tensors ``(T, …)`` of the parameter.
            context: What is known of the parameter; its survey is that of the wrapper.
            rule: The rule of the method inside.
        """

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter in the coordinates: ``(T, …) -> (…)``."""
        return self.merge_coordinates(deltas, context, self.inside.update)

    def task_update(self, deltas: Tensor, expert: int, context: Context) -> Tensor:
        """Merge a parameter in the coordinates, for one expert's task: ``(T, …) -> (…)``."""

        def rule(block: Tensor, inner: Context) -> Tensor:
            return self.inside.task_update(block, expert, inner)

        return self.merge_coordinates(deltas, context, rule)
