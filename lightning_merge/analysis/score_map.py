"""SCORE's view of a layer: directions in which the experts add up, and those in which they conflict.

Chaves et al., "Bridging Domains through Subspace-Aware Model Merging", CVPR 2026, arXiv 2603.05768, Figure 3. The map
``Σ_score`` is what the method puts between the two bases. Its diagonal is where experts act along one common direction
(agreement); what stands off the diagonal leads from one expert's direction into another's (conflict). The paper sorts
layers into high and low by eye; ``agreement`` and ``conflict`` are our measure of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_merge.methods.score import SCORE, project, prune
from lightning_merge.methods.tsv_m import task_singular_basis
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.tensors import wide


@dataclass(frozen=True)
class ScoreMap:
    """The map of SCORE for one layer; P_i is the projection of expert i into SCORE's basis.

    Args:
        resolved: ``Σ_score (qT, qT)``, the sum of what is kept of every P_i; ``q = min(m, n) // T``.
        kept: The share of the P_i's off-diagonal energy that is kept; NaN if there is none.
        off_diagonal: The share of the P_i's energy that lies off the diagonal; NaN for zero matrices.
        projected: The share of the task matrices' energy that lies in the basis at all.
        agreement: The energy of ``Σ_score`` on its diagonal, as a share of that of the task matrices; low where the
            experts cancel each other.
        conflict: The energy of ``Σ_score`` off its diagonal, as a share of that of the task matrices.
    """

    resolved: Tensor
    kept: float
    off_diagonal: float
    projected: float
    agreement: float
    conflict: float

    @property
    def pruned(self) -> float:
        """The share of the off-diagonal energy that is dropped."""
        return 1 - self.kept


def score_map(deltas: Tensor, method: SCORE | None = None) -> ScoreMap:
    """Compute the map of SCORE for one layer.

    Args:
        deltas: The task matrices of T experts ``(T, m, n)``; half precision is computed in float32.
        method: SCORE with other arguments than its defaults.

    Returns:
        The map and its energies, which are summed up in float64.

    Raises:
        MergeError: If there are fewer than two experts, or fewer singular directions than experts.
    """
    method = method or SCORE()
    if not 2 <= len(deltas) <= min(deltas.shape[1:]):
        raise MergeError(
            f"SCORE's map needs at least two experts, and a direction for each; {len(deltas)} experts with matrices of "
            f"shape {tuple(deltas.shape[1:])} have none."
        )
    deltas = wide(deltas)
    U, _, Vt = task_singular_basis(deltas)  # (m, qT), (qT, n)
    projections = project(deltas, U, Vt)  # (T, qT, qT)
    pruned = prune(projections, method.mode, method.z, method.divide_by_num_tasks, method.threshold)
    resolved = pruned.sum(dim=0)
    whole = _energy(deltas)
    on, off = _energies(projections)
    resolved_on, resolved_off = _energies(resolved)
    return ScoreMap(
        resolved=resolved,
        kept=_share(_energies(pruned)[1], off),
        off_diagonal=_share(off, on + off),
        projected=_share(on + off, whole),
        agreement=_share(resolved_on, whole),
        conflict=_share(resolved_off, whole),
    )


def pool(matrix: Tensor, size: int) -> Tensor:
    """Reduce a matrix to at most ``(size, size)``; each cell keeps its entry of largest magnitude, with its sign."""
    rows, columns = (min(count, size) for count in matrix.shape)
    if (rows, columns) == tuple(matrix.shape):
        return matrix
    _, places = F.adaptive_max_pool2d(matrix.abs()[None, None], (rows, columns), return_indices=True)
    return matrix.flatten()[places[0, 0]]


def _energies(matrices: Tensor) -> tuple[float, float]:
    """Compute the energy on the diagonals of ``(…, r, r)``, and off them."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    return _energy(diagonal), _energy(matrices - torch.diag_embed(diagonal))


def _energy(tensor: Tensor) -> float:
    """Sum up the squares of all entries, in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
