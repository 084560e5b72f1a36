"""Karcher mean (Grove and Karcher, "How to Conjugate C1-Close Group Actions", Math. Z. 1973), as in mergekit (2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Paper, check_range
from lightning_merge.methods.base.weight_space import WeightSpaceMethod
from lightning_merge.utilities.tensors import norm


def karcher_mean(vectors: Tensor, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """Take the Riemannian mean of the directions on the unit sphere, and give it the mean length of the vectors.

    Args:
        vectors: ``(T, d)``.
        max_iter: The most steps of the fixed-point iteration ``mean <- exp_mean(mean of log_mean(directions))``.
        tol: The iteration ends when a step is shorter, in radians; vectors shorter than this have no direction.

    Returns:
        ``(d,)``.
    """
    norms = norm(vectors, dim=1)  # (T,)
    directions = vectors[norms > tol] / norms[norms > tol].unsqueeze(1)
    if len(directions) == 0:
        return vectors.mean(dim=0)
    mean = directions.mean(dim=0)
    length = torch.linalg.vector_norm(mean)
    mean = directions[0] if length < tol else mean / length
    for _ in range(max_iter):
        step = logarithm(mean, directions, tol).mean(dim=0)
        angle = torch.linalg.vector_norm(step)
        if angle < tol:
            break
        mean = torch.cos(angle) * mean + torch.sin(angle) * step / angle
        mean = mean / torch.linalg.vector_norm(mean)
    return norms.mean() * mean


def logarithm(point: Tensor, directions: Tensor, tol: float) -> Tensor:
    """Compute the tangent vectors at a point of the unit sphere that lead to others: ``(d,), (T, d) -> (T, d)``.

    Zero for directions nearer than ``tol``, and for the opposite of the point, to which all ways are equally long.
    """
    cosines = directions @ point  # (T,)
    tangents = directions - cosines.unsqueeze(1) * point
    sines = torch.linalg.vector_norm(tangents, dim=1)
    angles = torch.atan2(sines, cosines)  # the arc cosine, but exact for small angles
    far = (angles >= tol) & (sines >= tol)
    return tangents * torch.where(far, angles / torch.where(far, sines, 1), 0).unsqueeze(1)


@dataclass(frozen=True)
class Karcher(WeightSpaceMethod):
    """The Riemannian mean of the experts' weights on the sphere, parameter by parameter.

    Args:
        max_iter: The most steps of the fixed-point iteration; at least 1.
        tol: The iteration ends when a step is shorter, in radians; must be positive.
        scale: Scaling coefficient of the update; 1 is the mean.
    """

    paper: ClassVar[Paper] = Paper("Grove and Karcher", "Math. Z.", 1973)
    formula: ClassVar[str] = "θ = mean_t ‖θ_t‖ · d; d minimises Σ_t angle(d, θ_t)² on the unit sphere"

    max_iter: int = 10
    tol: float = 1e-5

    def __post_init__(self) -> None:
        check_range(self, "max_iter", 1, float("inf"))
        check_range(self, "tol", 0, 1, open_low=True)

    def combine(self, weights: Tensor) -> Tensor:
        """Merge the weights of a parameter: ``(T, d) -> (d,)``, see :func:`karcher_mean`; one expert stays itself."""
        return karcher_mean(weights, self.max_iter, self.tol) if len(weights) > 1 else weights[0]
