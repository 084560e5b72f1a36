"""MaTS (Tam et al., "Merging by Matching Models in Task Parameter Subspaces", TMLR 2024, arXiv 2312.04339)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.regmean import reduce_off_diagonal

Initialization = Literal["task_arithmetic", "average", "pretrained"]


def conjugate_gradients(
    system: Callable[[Tensor], Tensor], start: Tensor, residual: Tensor, iterations: int, tolerance: Tensor | float
) -> Tensor:
    """Solve ``system(X) = B`` for a symmetric positive semidefinite system, from a start.

    Args:
        system: The linear map, ``(m, n) -> (m, n)``.
        start: ``(m, n)``.
        residual: ``(m, n)``, ``B - system(start)``.
        iterations: The most steps.
        tolerance: The iteration ends when the norm of the residual is not larger.

    Returns:
        X ``(m, n)``.
    """
    x, direction, size = start, residual, residual.square().sum()
    for _ in range(iterations):
        if size.sqrt() <= tolerance:
            break
        image = system(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:  # nothing is left but rounding
            break
        step = size / curvature
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return x


@dataclass(frozen=True)
class MaTS(MergeMethod):
    """Matching in task parameter subspaces: linear layers are merged with a block-wise Fisher, iteratively.

    With the Gram matrices G of a layer's inputs and H of the gradients at its outputs, ``Σ H_i W G_i = Σ H_i W_i G_i``
    is solved for W by conjugate gradients. Needs ``gram.<parameter>`` and ``gram_out.<parameter>`` of every expert, for
    the layers that are to be merged so; layers with the first alone (attention as open_clip has it) are merged without
    the second, and parameters with neither are averaged, as in the official code.

    Args:
        iterations: The most steps of conjugate gradients, at least 1; the paper takes 10 to 100, chosen on validation
            data. Stopping early is what keeps directions small that the data hardly determine: 100 ruined the digits.
        backward: Use the gradients at the outputs; without them the solution is RegMean's.
        initialization: Where the iteration starts: ``task_arithmetic`` (with coefficient 0.3), the ``average`` of the
            experts, or the ``pretrained`` base. (The official code gives the base untransposed; here it is as meant.)
        reduce_off_diagonal: What the off-diagonal entries of the Gram matrices are multiplied by, in [0, 1].
        rtol: The iteration ends when the residual is this share of the right-hand side; must not be negative.
        scale: Scaling coefficient of the update; 1 is the solution itself.
    """

    paper: ClassVar[Paper] = Paper("Tam et al.", "TMLR", 2024, "2312.04339")
    formula: ClassVar[str] = "Σ_t H_t W G_t = Σ_t H_t W_t G_t; G_t of a layer's inputs, H_t of its outputs' gradients"
    dtype: ClassVar[torch.dtype] = torch.float64

    iterations: int = 10
    backward: bool = True
    initialization: Initialization = "task_arithmetic"
    reduce_off_diagonal: float = 1.0
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        check_range(self, "iterations", 1, float("inf"))
        check_choice(self, "initialization", ("task_arithmetic", "average", "pretrained"))
        check_range(self, "reduce_off_diagonal", 0, 1)
        check_range(self, "rtol", 0, float("inf"))

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # follows the arguments
        """The Gram matrices of the inputs, and those of the gradients at the outputs."""
        return ("gram", "gram_out") if self.backward else ("gram",)

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Solve for the difference to the base, to the tolerance for the weights themselves: ``(T, …) -> (…)``."""
        if not deltas.any() or "gram" not in context.statistics:
            return self.tensor(deltas, context)
        kinds = [kind for kind in self.needs if kind in context.statistics]
        grams, *outer = (reduce_off_diagonal(context.statistics[kind], self.reduce_off_diagonal) for kind in kinds)

        def images(matrices: Tensor) -> Tensor:  # (T, m, n) or (m, n) -> (m, n)
            forward = matrices @ grams
            return (outer[0] @ forward if outer else forward).sum(dim=0)

        matrices = deltas.flatten(2)
        start = {
            "task_arithmetic": 0.3 * matrices.sum(dim=0),
            "average": matrices.mean(dim=0),
            "pretrained": torch.zeros_like(matrices[0]),
        }[self.initialization]
        tolerance = self.rtol * images(matrices + context.finite_base.flatten(1)).norm()
        solution = conjugate_gradients(images, start, images(matrices - start), self.iterations, tolerance)
        return solution.reshape(deltas.shape[1:])
