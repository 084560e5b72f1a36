"""SLERP (Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985), as model mergers use it (mergekit)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Paper, check_range
from lightning_merge.methods.base.weight_space import WeightSpaceMethod
from lightning_merge.utilities.tensors import norm


def slerp(a: Tensor, b: Tensor, t: float, colinear: float = 0.9995, eps: float = 1e-8) -> Tensor:
    """Interpolate on the arc between two vectors: ``(d,), (d,) -> (d,)``.

    Args:
        a: Where ``t`` is 0.
        b: Where ``t`` is 1.
        t: Share of the angle.
        colinear: Vectors whose cosine is larger than this in magnitude are interpolated on the straight line.
        eps: Vectors shorter than this are not normalised.
    """
    norms = [norm(vector, dim=0) for vector in (a, b)]
    cosine = (a / torch.where(norms[0] > eps, norms[0], 1)) @ (b / torch.where(norms[1] > eps, norms[1], 1))
    if abs(cosine) > colinear:
        return (1 - t) * a + t * b
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@dataclass(frozen=True)
class SLERP(WeightSpaceMethod):
    """Spherical linear interpolation of the weights of two experts, parameter by parameter.

    Where the cosine of a parameter's two weight vectors is above 0.9995, the interpolation is linear, as in mergekit.

    Args:
        t: Share of the way from the first expert to the second, in [0, 1].
        scale: Scaling coefficient of the update; 1 is the point on the arc.
    """

    paper: ClassVar[Paper] = Paper("Shoemake", "SIGGRAPH", 1985)
    formula: ClassVar[str] = "θ = (sin((1 - t) ω) θ_1 + sin(t ω) θ_2) / sin(ω); ω the angle between θ_1 and θ_2"
    max_experts: ClassVar[int | None] = 2

    t: float = 0.5

    def __post_init__(self) -> None:
        check_range(self, "t", 0, 1)

    @property
    def order_matters(self) -> bool:  # type: ignore[override]  # follows the arguments
        """Whether the order matters: everywhere but in the middle of the arc, which is the same from both ends."""
        return self.t != 0.5

    def combine(self, weights: Tensor) -> Tensor:
        """Merge the weights of a parameter: ``(2, d) -> (d,)``, see :func:`slerp`; one expert stays itself."""
        return slerp(weights[0], weights[1], self.t) if len(weights) > 1 else weights[0]
