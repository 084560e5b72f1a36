"""Iso-CTS (Marczak et al., "No Task Left Behind: Isotropic Model Merging", ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.iso_c import iso_c
from lightning_merge.utilities.linalg import polar, svd


def split_rank(rank: int, num_experts: int, common_fraction: float) -> tuple[int, int]:
    """Split a rank into the common dimensions and the dimensions that each expert gets: ``(common, per_task)``.

    As in the official code: the task-specific part is rounded to a multiple of the number of experts (halves to even),
    though here never to more than the rank.
    """
    per_task = min(round((rank - int(rank * common_fraction)) / num_experts), rank // num_experts)
    return rank - per_task * num_experts, per_task


def iso_cts(deltas: Tensor, common_fraction: float = 0.8) -> Tensor:
    """Merge in a common subspace enriched by task-specific directions, with a flat spectrum.

    Args:
        deltas: ``(T, m, n)``.
        common_fraction: Share of the rank that the common subspace gets.

    Returns:
        ``(m, n)``.
    """
    T, m, n = deltas.shape
    common, per_task = split_rank(min(m, n), T, common_fraction)
    if per_task == 0:
        return iso_c(deltas)
    total = deltas.sum(dim=0)
    if common > 0:
        U, s, Vt = svd(total, common)
        deltas = deltas - U @ (U.mT @ deltas)  # without the common directions, on the left side only
    else:
        U, s, Vt = total.new_zeros(m, 0), total.new_zeros(0), total.new_zeros(0, n)
    Us, ss, Vts = svd(deltas, per_task)
    left = polar(torch.cat([*Us, U], dim=1))
    right = polar(torch.cat([*Vts, Vt], dim=0))
    return torch.cat([ss.flatten(), s]).mean() * (left @ right)


@dataclass(frozen=True)
class IsoCTS(MergeMethod):
    """Isotropic merging in common and task-specific subspaces. Tensors that are no matrices are averaged.

    Args:
        common_fraction: Share of the rank that the common subspace gets, in [0, 1]; 1 is Iso-C.
        scale: Scaling coefficient; the paper chooses it on validation data, SCORE's comparison uses 1.
    """

    paper: ClassVar[Paper] = Paper("Marczak et al.", "ICML", 2025, "2502.04959")
    formula: ClassVar[str] = (
        "τ = mean(σ) polar([U_1 … U_T U]) polar([V_1 … V_T V])ᵀ; U, V lead Σ_t Δ_t, U_t, V_t the rest"
    )
    factorizes: ClassVar[bool] = True
    factorizations: ClassVar[tuple[int, int]] = (1, 3)

    common_fraction: float = 0.8

    def __post_init__(self) -> None:
        check_range(self, "common_fraction", 0, 1)

    def matrix(self, deltas: Tensor, context: Context) -> Tensor:
        """Merge a matrix: ``(T, m, n) -> (m, n)``, see :func:`iso_cts`."""
        return iso_cts(deltas, self.common_fraction)
