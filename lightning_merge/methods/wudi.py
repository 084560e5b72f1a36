"""WUDI-Merging (Cheng et al., "Whoever Started the Interference Should End It", ICML 2025, arXiv 2503.08099)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge.checkpoints.names import matches
from lightning_merge.methods.base import Context, MergeMethod, Paper, check_choice, check_range
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.linalg import svd
from lightning_merge.utilities.tensors import mean, norm

_OPENCLIP = ("*in_proj_weight", "*out_proj.weight", "*c_fc.weight", "*c_proj.weight")
_TIMM = ("*attn.qkv.weight", "*attn.proj.weight", "*mlp.fc1.weight", "*mlp.fc2.weight")


def wudi(deltas: Tensor, iterations: int = 300, lr: float = 1e-5) -> Tensor:
    """Minimise ``Σ_i |(τ - Δ_i) Δ_iᵀ|² / |Δ_i|²`` by Adam from ``τ = Σ Δ_i``: ``(T, m, n) -> (m, n)``.

    The gradient is ``2 (τ S - R)`` with ``S = Σ Δ_iᵀ Δ_i / |Δ_i|²`` and ``R = Σ Δ_i Δ_iᵀ Δ_i / |Δ_i|²``, so that a step
    costs one product of matrices for any number of experts.
    """
    units = normalized(deltas)
    S = torch.einsum("tmi,tmj->ij", units, units)
    R = (deltas @ (units.mT @ units)).sum(dim=0)
    merged = deltas.sum(dim=0)
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)  # Adam's moments
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    for step in range(1, iterations + 1):
        gradient = 2 * (merged @ S - R)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt().add_(eps)
        merged = merged - lr / (1 - beta1**step) * first / denominator
    return merged


def wudi_closed_form(deltas: Tensor) -> Tensor:
    """Solve the same problem exactly, ``τ = R S⁺``: ``(T, m, n) -> (m, n)``. RegMean with the experts as their inputs.

    ``S`` is never formed: it is the Gram matrix of the stacked ``Δ_i / |Δ_i|``, whose singular values keep all digits.
    """
    T, m, n = deltas.shape
    units = normalized(deltas)
    U, s, Vt = svd(units.reshape(T * m, n))
    inverse = torch.where(s > 0, 1 / s, 0)
    product = (deltas @ (units.mT @ U.reshape(T, m, -1))).sum(dim=0)  # (m, k)
    return (product * inverse) @ Vt


def normalized(deltas: Tensor) -> Tensor:
    """Divide every expert's matrix by its Frobenius norm: ``(T, m, n) -> (T, m, n)``; zero where it is zero."""
    size = norm(deltas, dim=(-2, -1), keepdim=True)
    return torch.where(size > 0, deltas / size, 0)


@dataclass(frozen=True)
class WUDI(MergeMethod):
    """Merging of linear layers by the update that interferes least with every expert's inputs, which span its own rows.

    Args:
        iterations: Steps of Adam.
        lr: Adam's learning rate, positive; no entry moves by much more than ``iterations · lr``.
        closed_form: Solve for the minimum instead, which is far from where the paper's steps arrive.
        parameters: Patterns of the parameters that are merged, if they are matrices: by default the linear layers
            in the blocks of OpenCLIP's (as in the official code) and timm's transformers.
        others: What happens to the other parameters: ``base`` keeps the base's, as the official code does; ``mean``.
        scale: Scaling coefficient; the paper always uses 1.
    """

    paper: ClassVar[Paper] = Paper("Cheng et al.", "ICML", 2025, "2503.08099")
    formula: ClassVar[str] = "τ minimises Σ_t ‖(τ - Δ_t) Δ_tᵀ‖² / ‖Δ_t‖²"
    dtype: ClassVar[torch.dtype] = torch.float64
    reads_twice: ClassVar[bool] = True

    iterations: int = 300
    lr: float = 1e-5
    closed_form: bool = False
    parameters: Sequence[str] = (*_OPENCLIP, *_TIMM)
    others: Literal["base", "mean"] = "base"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        check_range(self, "iterations", 0, float("inf"), open_high=True)
        check_range(self, "lr", 0, float("inf"), open_low=True, open_high=True)
        check_choice(self, "others", ("base", "mean"))

    def survey(self, task_vectors: TaskVectors) -> None:
        """Raise a MergeError if none of the model's parameters would be merged."""
        if not any(matches(name, self.parameters) for name in task_vectors):
            raise MergeError(
                f"WUDI merges the parameters that match {', '.join(self.parameters)}; this model has none. "
                f"Give patterns of its linear layers as `parameters`; its names look like "
                f"{', '.join(list(task_vectors)[:5])}."
            )

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix: ``(T, m, n) -> (m, n)``, see :func:`wudi` and :func:`wudi_closed_form`."""
        if not matches(context.name, self.parameters):
            return self.tensor(deltas, context)
        return wudi_closed_form(deltas) if self.closed_form else wudi(deltas, self.iterations, self.lr)

    def tensor(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a parameter, ``(T, …) -> (…)``: zeros, or the mean."""
        return torch.zeros_like(deltas[0]) if self.others == "base" else mean(deltas)
