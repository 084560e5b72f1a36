"""Methods that merge the weights themselves, and not their differences to the base."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base.context import Context
from lightning_merge.methods.base.method import MergeMethod


@dataclass(frozen=True)
class WeightSpaceMethod(MergeMethod):
    """A method on the experts' weights, every parameter as one vector. The update is what it adds to the base.

    Args:
        scale: Scaling coefficient of the update; 1 is the merged weights themselves.
    """

    dtype: ClassVar[torch.dtype] = torch.float64  # angles between experts of one base are small

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Merge the weights of a parameter: ``(T, d) -> (d,)``."""

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: the merged weights minus the base."""
        if not deltas.any():
            return torch.zeros_like(deltas[0])
        base = context.finite_base
        weights = (base + deltas).flatten(1) if deltas.ndim > 1 else (base + deltas).unsqueeze(1)
        return self.combine(weights).reshape(deltas.shape[1:]) - base
