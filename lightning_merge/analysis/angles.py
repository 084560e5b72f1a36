"""Principal angles between the directions in which experts act.

Chaves et al. (CVPR 2026, arXiv 2603.05768, Figure 4) show a mean angle ``θ_avg`` for every pair of experts, without
publishing the formula. What is computed here is our reading of it: the mean of the principal angles between the leading
left singular subspaces, whose ranks follow the same rule as for the subspace alignment ratio.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from lightning_merge.analysis.alignment import OF_PAIRS, RankRule
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.linalg import gram, svd
from lightning_merge.utilities.tensors import wide


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """Compute the principal angles between two subspaces, in radians.

    Large ones come from cosines and small ones from sines, so that all are exact to rounding (Björck and Golub, 1973;
    Knyazev and Argentati, 2002).

    Args:
        U: An orthonormal basis of the one, ``(m, k)``.
        V: An orthonormal basis of the other, ``(m, l)``.

    Returns:
        ``(min(k, l),)`` in float64, in descending order.

    Raises:
        MergeError: If the subspaces are not of one space.
    """
    if U.ndim != 2 or V.ndim != 2 or len(U) != len(V):
        raise MergeError(f"Bases of shapes {tuple(U.shape)} and {tuple(V.shape)} span no subspaces of one space.")
    U, V = U.double(), V.double().to(U.device)
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    if V.shape[1] == 0:
        return U.new_empty(0)
    overlap = U.mT @ V
    cosines = torch.linalg.svdvals(overlap).flip(0)  # ascending: the largest angle first
    sines = torch.linalg.svdvals(V - U @ overlap)  # descending
    return torch.where(cosines.square() < 0.5, cosines.clamp(max=1).arccos(), sines.clamp(max=1).arcsin())


def pairwise_angles(deltas: Tensor, rule: RankRule = OF_PAIRS) -> Tensor:
    """Compute ``θ_avg``, the mean principal angle between the leading left singular subspaces of every two experts.

    Args:
        deltas: The task matrices of T experts, ``(T, m, n)``.
        rule: The rule for the dimension of a subspace; by default it keeps more than 0.97 of the norm.

    Returns:
        Radians in float64 ``(T, T)``, between 0 (one subspace lies in the other) and π/2 (they are orthogonal); NaN for
        a matrix of zeros.
    """
    U, s, _ = svd(wide(deltas))
    ranks = [rule.rank(values) for values in s]
    angles = torch.diag(torch.tensor([0.0 if k else torch.nan for k in ranks], dtype=torch.float64))
    for i, j in combinations(range(len(deltas)), 2):
        angles[i, j] = angles[j, i] = mean_angle(U[i, :, : ranks[i]].mT @ U[j, :, : ranks[j]])
    return angles


def mean_angle(overlap: Tensor) -> float:
    """Compute the mean principal angle in radians from ``Uᵀ V (k, l)``; NaN if a subspace has no dimension.

    The cosines are the roots of the eigenvalues of a Gram matrix in float64, which is quick. From bases in float32, an
    angle below 1e-3 is only known to be that small.
    """
    short = overlap if overlap.shape[0] >= overlap.shape[1] else overlap.mT  # (long, short)
    if not short.shape[1]:
        return float("nan")
    return float(torch.linalg.eigvalsh(gram(short)).clamp(0, 1).sqrt().arccos().mean())
