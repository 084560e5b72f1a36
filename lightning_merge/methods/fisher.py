"""Fisher merging (NeurIPS 2022, arXiv 2111.09832).

Matena and Raffel, "Merging Models with Fisher-Weighted Averaging".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import (
    Context,
    MergeMethod,
    Paper,
    check_choice,
    check_range,
    check_weight_count,
    check_weights,
)
from lightning_merge.methods.base.task_vectors import TaskVectors


def fisher_average(deltas: Tensor, fishers: Tensor, weights: Tensor) -> Tensor:
    """Average every entry in proportion to ``λ F``: ``(T, …), (T, …), (T,) -> (…)``; plainly where all are zero.

    Of weights and of differences to one base this is the same.
    """
    precision = fishers * weights.view(-1, *[1] * (deltas.ndim - 1))
    total = precision.sum(dim=0)
    average = (precision / torch.where(total > 0, total, 1) * deltas).sum(dim=0)
    return average.where(total > 0, deltas.mean(dim=0))


@dataclass(frozen=True)
class Fisher(MergeMethod):
    """The average of the experts, entry by entry in proportion to the diagonal of their Fisher information.

    Needs ``fisher.<parameter>`` of every expert, for every merged parameter. The codes differ in what they do to it:

    * Matena and Raffel: ``Fisher(smooth=0, floor=1e-6, favor_target_model=True, normalize="model")``;
    * RegMean's repository: ``Fisher()``, and ``normalize="param"`` or ``"model"`` as an option;
    * MergeLM: ``Fisher(smooth=1e-6)``;
    * MaTS, diagonal: ``Fisher(smooth=0, floor=1e-8)``.

    Args:
        smooth: Added to every Fisher; must not be negative.
        floor: Smaller values are raised to this; must not be negative.
        favor_target_model: Apply the floor to the first expert only, which so decides where no Fisher is large.
        normalize: Divide the experts' weights by the norm of their Fisher: over the whole ``model``, or of each
            parameter (``param``).
        weights: The experts' weights λ, in their order; by default all count alike.
        scale: Scaling coefficient of the update; 1 is the average itself.
    """

    paper: ClassVar[Paper] = Paper("Matena and Raffel", "NeurIPS", 2022, "2111.09832")
    formula: ClassVar[str] = "θ = Σ_t F_t ∘ θ_t / Σ_t F_t"
    needs: ClassVar[tuple[str, ...]] = ("fisher",)
    reads_twice: ClassVar[bool] = True

    smooth: float = 1e-10
    floor: float = 0.0
    favor_target_model: bool = False
    normalize: Literal["none", "param", "model"] = "none"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_range(self, "smooth", 0, float("inf"))
        check_range(self, "floor", 0, float("inf"))
        check_choice(self, "normalize", ("none", "param", "model"))
        check_weights(self)

    @property
    def order_matters(self) -> bool:  # type: ignore[override]  # follows the arguments
        """Whether there are weights, or a target model, which go by the position of the experts."""
        return self.weights is not None or self.favor_target_model

    def check_count(self, num_experts: int) -> None:
        """Raise a MergeError unless there is a weight for every expert."""
        super().check_count(num_experts)
        check_weight_count(self, num_experts)

    def survey(self, task_vectors: TaskVectors) -> Tensor | None:
        """Compute the norms ``(T,)`` of the experts' Fishers over the whole model, where they are asked for."""
        if self.normalize != "model":
            return None
        return torch.stack([norms(task_vectors.context(name).statistics["fisher"]) for name in task_vectors]).norm(
            dim=0
        )

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter: ``(T, …) -> (…)``, see :func:`fisher_average`; all parameters alike."""
        fishers = context.statistics["fisher"]
        weights = deltas.new_ones(len(deltas)) if self.weights is None else deltas.new_tensor(self.weights)
        if self.normalize != "none":
            size = context.survey if self.normalize == "model" else norms(fishers)
            size = size + self.smooth
            weights = weights / torch.where(size > 0, size, 1)
        fishers = fishers + self.smooth
        floored = fishers.clamp(min=self.floor)
        if self.favor_target_model:
            floored = torch.cat([floored[:1], fishers[1:]])
        return fisher_average(deltas, floored, weights)


def norms(fishers: Tensor) -> Tensor:
    """Compute the norm of every expert's Fisher: ``(T, …) -> (T,)``."""
    return fishers.reshape(len(fishers), -1).double().norm(dim=1).to(fishers.dtype)  # squares of small numbers
