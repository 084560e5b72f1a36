"""The rule for which parameters count as matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_merge.checkpoints.names import matches


@dataclass(frozen=True)
class Matrices:
    """The rule for which parameters count as matrices. The default is the one that all published codes share.

    Args:
        exclude: Two-dimensional parameters whose name matches one of these patterns are not matrices.
        flatten_convolutions: Treat a convolution kernel as a matrix ``(out, in · height · width)``, as no published
            code does.
        split: Treat a parameter whose name matches one of these patterns as three matrices, one above the other: the
            fused query, key and value projections of an attention layer. No published code does.
    """

    exclude: Sequence[str] = ("*text_projection*",)
    flatten_convolutions: bool = False
    split: Sequence[str] = ()

    def view(self, name: str, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """Find the shape ``(blocks, m, n)`` of a parameter as matrices one above the other; None if it is no matrix."""
        if matches(name, self.exclude) or 0 in shape:
            return None
        if len(shape) == 2:
            rows, columns = shape
        elif len(shape) > 2 and self.flatten_convolutions:
            rows, columns = shape[0], torch.Size(shape[1:]).numel()
        else:
            return None
        blocks = 3 if matches(name, self.split) and rows % 3 == 0 else 1
        return blocks, rows // blocks, columns

    def whole(self) -> Matrices:
        """Copy the rule, with no parameter split into several matrices."""
        return replace(self, split=())

    def blocks(self, name: str, stack: Tensor) -> tuple[Tensor, ...] | None:
        """Split a stacked parameter ``(T, …)`` into its matrices ``(T, m, n)``; None if it is no matrix."""
        view = self.view(name, stack.shape[1:])
        return None if view is None else stack.reshape(len(stack), *view).unbind(dim=1)
