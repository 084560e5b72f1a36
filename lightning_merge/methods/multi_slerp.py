"""Multi-SLERP (Goddard, "Multi-SLERP", 2025, goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, Paper, check_choice, check_weight_count, check_weights
from lightning_merge.methods.base.weight_space import WeightSpaceMethod
from lightning_merge.utilities.tensors import norm


def multi_slerp(vectors: Tensor, weights: Tensor, eps: float = 1e-8) -> Tensor:
    """Take the weighted mean of the directions, on the sphere, and give it the weighted mean of the lengths.

    mergekit goes on to the tangent space at the mean direction. There the weighted sum of the projected directions is
    zero whatever the weights, so that the exponential map leads back to the mean direction: this is all of it.

    Args:
        vectors: ``(T, d)``.
        weights: ``(T,)``, with sum 1.
        eps: A mean direction shorter than this (of opposite vectors) is none; the mean of the vectors is returned.

    Returns:
        ``(d,)``.
    """
    norms = norm(vectors, dim=1)  # (T,)
    mean = weights @ (vectors / (norms + eps).unsqueeze(1))
    length = torch.linalg.vector_norm(mean)
    if length < eps:
        return weights @ vectors
    return (weights @ norms) * mean / length


@dataclass(frozen=True)
class MultiSLERP(WeightSpaceMethod):
    """Barycentric interpolation on the sphere for any number of experts, parameter by parameter.

    Where directions cancel, mergekit refuses to merge more than two experts; here they are averaged.

    Args:
        weights: The experts' weights, in their order; divided by their sum. By default all experts count alike.
        origin: The centre of the sphere: ``zero`` merges the weights, ``base`` the task vectors (mergekit with a base).
        scale: Scaling coefficient of the update; 1 is the interpolated point.
    """

    paper: ClassVar[Paper] = Paper("Goddard", "goddard.blog", 2025)
    formula: ClassVar[str] = "θ = Σ_t w_t ‖θ_t‖ · d / ‖d‖; d = Σ_t w_t θ_t / ‖θ_t‖"

    weights: tuple[float, ...] | None = None
    origin: Literal["zero", "base"] = "zero"

    def __post_init__(self) -> None:
        check_choice(self, "origin", ("zero", "base"))
        check_weights(self)

    @property
    def order_matters(self) -> bool:  # type: ignore[override]  # follows the arguments
        """Whether there are weights, which go by the position of the experts."""
        return self.weights is not None

    def check_count(self, num_experts: int) -> None:
        """Raise a MergeError unless there is a weight for every expert."""
        super().check_count(num_experts)
        check_weight_count(self, num_experts)

    def update(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: around zero or around the base."""
        if self.origin == "zero" or not deltas.any():
            return super().update(deltas, context)
        return self.combine(deltas.reshape(len(deltas), -1)).reshape(deltas.shape[1:])

    def combine(self, weights: Tensor) -> Tensor:
        """Merge the weights of a parameter: ``(T, d) -> (d,)``, see :func:`multi_slerp`; one expert stays itself."""
        if len(weights) == 1:
            return weights[0].clone()
        shares = weights.new_tensor(self.weights or [1.0] * len(weights))
        return multi_slerp(weights, shares / shares.sum())
