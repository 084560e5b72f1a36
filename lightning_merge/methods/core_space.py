"""Core Space (NeurIPS 2025, arXiv 2509.17786).

Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_merge.methods.base import Context, MergeMethod, Paper, check_range
from lightning_merge.methods.base.blocks import Blocks
from lightning_merge.methods.base.coordinate_wrapper import CoordinateWrapper, Rule
from lightning_merge.methods.base.task_vectors import TaskVectors
from lightning_merge.methods.tsv_m import TSVM
from lightning_merge.utilities.linalg import above, isotropize, svd


class Survey(NamedTuple):
    """The reference bases of a model's matrices, and the task vectors in them.

    Args:
        bases: Every adapted matrix's reference bases ``U (m, a)`` and ``Vt (b, n)``.
        blocks: The core matrices.
        inner: The survey of the method inside, over all core matrices or for each of them.
    """

    bases: dict[str, tuple[Tensor, Tensor]]
    blocks: Blocks
    inner: Any


def reference_bases(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Compute bases that all experts share: left singular vectors of ``[B_1 … B_T]``, right ones of ``[A_1; …; A_T]``.

    Args:
        factors: ``B_i (m, r_i)`` and ``A_i (r_i, n)`` of every expert.

    Returns:
        ``U (m, a)`` and ``Vt (b, n)``; a and b are the ranks of the stacks, at most ``Σ r_i``.
    """
    U, left, _ = svd(torch.cat([B for B, _ in factors], dim=1))
    _, right, Vt = svd(torch.cat([A for _, A in factors], dim=0))
    return U[:, left > 0], Vt[right > 0]


def balanced_factors(deltas: Tensor, threshold: float = 1e-5) -> list[tuple[Tensor, Tensor]]:
    """Factorize dense task matrices by their SVD, ``B = U √s`` and ``A = √s Vt``: ``(T, m, n) -> [(m, r), (r, n)]``.

    Args:
        deltas: ``(T, m, n)``.
        threshold: Singular values up to this one (an absolute number) are dropped, see
            :func:`lightning_merge.utilities.linalg.above`.
    """
    factors = []
    triplets = svd(deltas)
    for U, s, Vt, kept in zip(*triplets, above(triplets[1], threshold), strict=True):
        root = s[kept].sqrt()
        factors.append((U[:, kept] * root, root.unsqueeze(-1) * Vt[kept]))
    return factors


@dataclass(frozen=True)
class CoreSpace(CoordinateWrapper):
    """Merging of LoRA experts in the small space that their factors span, where nothing of them is lost.

    The method inside sees the core matrices ``Uᵀ Δ_i V`` instead of the experts' matrices. The bases come from the
    adapters' own factors where all experts are adapters, otherwise from balanced factors of the dense matrices; that
    makes a difference to methods that look at single entries (TIES), not to those that commute
    with rotations (Task Arithmetic, TSV-M, Iso-C, CART). Tensors that are no matrices are averaged.

    Args:
        method: The method that merges the core matrices.
        isotropize: Give every merged core matrix a flat spectrum, as Iso-C does.
        per_layer: Let the method inside survey every core matrix by itself, as the authors' code does; otherwise all
            of them together, so that a threshold is that of the whole model.
        sv_threshold: Singular values of dense experts up to this one (an absolute number) are dropped, or, where that
            would be all of a matrix, up to this share of the largest; not negative.
        scale: Scaling coefficient of the update; by default that of the method inside.
    """

    paper: ClassVar[Paper] = Paper("Panariello et al.", "NeurIPS", 2025, "2509.17786")
    formula: ClassVar[str] = "τ = U M Vᵀ; M merges Uᵀ Δ_t V; Δ_t = B_t A_t; U spans [B_1 … B_T], V spans [A_1ᵀ … A_Tᵀ]"
    factorizes: ClassVar[bool] = True
    reads_twice: ClassVar[bool] = True
    default_method: ClassVar[MergeMethod] = TSVM()

    isotropize: bool = False
    per_layer: bool = True
    sv_threshold: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "sv_threshold", 0, float("inf"), open_high=True)

    def survey(self, task_vectors: TaskVectors) -> Survey:
        """Find the reference bases of every matrix, and have the method inside survey the core matrices."""

        def core(name: str, stack: Tensor) -> Tensor:
            U, Vt = bases[name]  # (m, a), (b, n)
            return U.mT @ stack.flatten(2) @ Vt.mT  # (T, a, b)

        bases, sizes = {}, {}
        for name, deltas in task_vectors.items():
            if not task_vectors.is_matrix(name) or not deltas.any():
                continue
            dense = deltas.flatten(2)  # (T, m, n)
            factors = [(B.to(dense), A.to(dense)) for B, A in task_vectors.factors(name) or ()]
            U, Vt = reference_bases(factors or balanced_factors(dense, self.sv_threshold))
            if U.shape[1] and len(Vt):
                bases[name], sizes[name] = (U, Vt), (U.shape[1], len(Vt))
        blocks = Blocks(
            task_vectors,
            sizes,
            read=lambda name: core(name, task_vectors[name]),
            read_base=lambda name: core(name, task_vectors.context(name).finite_base[None])[0],
        )
        if self.per_layer:
            inner: Any = {name: self.inside.survey(blocks.only(name)) for name in blocks}
        else:
            inner = self.inside.survey(blocks) if sizes else None
        return Survey(bases, blocks, inner)

    def merge_coordinates(self, deltas: Tensor, context: Context, rule: Rule) -> Tensor:
        """Merge a matrix in the core space: ``(T, …) -> (…)``. What is no matrix is averaged."""
        survey: Survey = context.survey
        name = context.name
        if context.matrices.view(name, deltas.shape[1:]) is None:
            return self.tensor(deltas, context)
        if name not in survey.bases:
            return torch.zeros_like(deltas[0])
        U, Vt = survey.bases[name]
        inner = survey.inner[name] if self.per_layer else survey.inner
        merged = rule(survey.blocks[name], survey.blocks.context(name, inner))  # (a, b)
        if self.isotropize:
            merged = isotropize(merged)
        return (U @ merged @ Vt).reshape(deltas.shape[1:])
