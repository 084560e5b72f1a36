"""Principal angles, against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import lightning_merge as lm
from lightning_merge.analysis import RankRule, leading_subspace, pairwise_angles, principal_angles


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(draw(*shape, seed=seed)).Q


@pytest.mark.parametrize(("k", "other"), [(3, 3), (2, 5), (5, 2), (1, 1), (6, 4), (8, 8)])
def test_are_those_of_scipy(k, other):
    """Where spaces of ``k`` and ``other`` dimensions share some of eight, scipy gives 0 or the root of a rounding."""
    U, V = basis(8, k), basis(8, other, seed=1)
    angles, theirs = principal_angles(U, V).numpy(), subspace_angles(U.numpy(), V.numpy())
    apart = min(k, other) - max(k + other - 8, 0)
    np.testing.assert_allclose(angles[:apart], theirs[:apart], atol=1e-12)
    np.testing.assert_allclose(angles[apart:], 0, atol=1e-12)
    np.testing.assert_allclose(theirs[apart:], 0, atol=1e-7)


def test_very_small_angles_are_exact():
    angle = 1e-9
    U = torch.eye(4, 2, dtype=torch.float64)
    V = U.clone()
    V[:, 1] = torch.tensor([0.0, math.cos(angle), math.sin(angle), 0.0])
    assert principal_angles(U, V).tolist() == pytest.approx([angle, 0.0], rel=1e-6)


def test_subspaces_without_dimension_or_of_other_spaces():
    assert principal_angles(basis(4, 0), basis(4, 2)).shape == (0,)
    with pytest.raises(lm.MergeError, match="no subspaces of one space"):
        principal_angles(basis(4, 2), basis(5, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_the_mean_over_the_leading_subspaces(shape, dtype):
    deltas = draw(3, *shape).to(dtype)
    rule = RankRule(threshold=0.8)
    found = pairwise_angles(deltas, rule)
    tops = [leading_subspace(delta.double(), threshold=0.8).numpy() for delta in deltas]
    expected = [[subspace_angles(a, b).mean() for b in tops] for a in tops]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0.1 < found[0, 1] < math.pi / 2


def test_orthogonal_the_same_and_zero():
    first, second = torch.zeros(2, 4, 4)
    first[:2, :2], second[2:, :2] = torch.eye(2), torch.eye(2)
    found = pairwise_angles(torch.stack([first, 3 * first, second, torch.zeros(4, 4)]))
    assert found[0, 1] == pytest.approx(0, abs=1e-3)
    assert found[0, 2] == pytest.approx(math.pi / 2)
    assert found[3].isnan().all()
    assert found[:, 3].isnan().all()
