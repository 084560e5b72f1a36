"""RegMean (ICLR 2023, arXiv 2212.09849).

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range


def reduce_off_diagonal(grams: Tensor, factor: float) -> Tensor:
    """Multiply everything but the diagonal by a factor: ``(…, n, n) -> (…, n, n)``."""
    return factor * grams + (1 - factor) * torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))


def regmean(deltas: Tensor, grams: Tensor) -> Tensor:
    """Find the layer whose outputs are nearest, in least squares, to those of every expert on its own inputs.

    That is ``W = (Σ W_i G_i) (Σ G_i)^-1``, the same for weights as for differences to one base. Directions that no
    expert's inputs have are averaged.

    Args:
        deltas: ``(T, m, n)``.
        grams: ``(T, n, n)``, the Gram matrices of the inputs.

    Returns:
        ``(m, n)``.
    """
    mean = deltas.mean(dim=0)
    return mean + ((deltas - mean) @ grams).sum(dim=0) @ torch.linalg.pinv(grams.sum(dim=0), hermitian=True)


@dataclass(frozen=True)
class RegMean(MergeMethod):
    """Regression mean: linear layers are merged in closed form, given the Gram matrices of their inputs.

    Needs ``gram.<parameter>`` of every expert, for the layers that are to be merged so (a kernel counts as the matrix
    ``(out, in · height · width)``). Parameters without one are averaged, as in the official code.

    Args:
        reduce_off_diagonal: What the off-diagonal entries of the Gram matrices are multiplied by, in [0, 1]; 1 leaves
            them, 0 keeps the diagonals only. The paper mostly takes 0.9.
        scale: Scaling coefficient of the update; 1 is the regression mean itself.
    """

    paper: ClassVar[Paper] = Paper("Jin et al.", "ICLR", 2023, "2212.09849")
    formula: ClassVar[str] = "W = (Σ_t W_t G_t) (Σ_t G_t)⁻¹; G_t = X_tᵀ X_t of a layer's inputs"
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (0, 1)
    dtype: ClassVar[torch.dtype] = torch.float64
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    reduce_off_diagonal: float = 0.9

    def __post_init__(self) -> None:
        check_range(self, "reduce_off_diagonal", 0, 1)

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`regmean`; whole parameters, as their Gram matrices are."""
        if not deltas.any() or "gram" not in context.statistics:
            return self.tensor(deltas, context)
        grams = reduce_off_diagonal(context.statistics["gram"], self.reduce_off_diagonal)
        return regmean(deltas.flatten(2), grams).reshape(deltas.shape[1:])
