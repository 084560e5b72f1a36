"""Norms, cosines, distances and sign conflicts."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.analysis import cosines, distances, inner_products, norms, sign_conflicts


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 70_000), (3, 300, 500), (2, 4, 3, 2, 2), (3,), (2, 0)])
def test_inner_products_are_exact_sums(shape):
    """More entries than are looked at together, and values whose sum in float32 would lose its digits."""
    vectors, others = draw(*shape) + 100, draw(*shape, seed=1)
    flat, other = (v.reshape(len(v), -1 if v.numel() else 0).double() for v in (vectors, others))
    torch.testing.assert_close(inner_products(vectors), flat @ flat.T, rtol=1e-13, atol=0)
    torch.testing.assert_close(inner_products(vectors, others[:1]), flat @ other[:1].T, rtol=1e-11, atol=1e-9)


def test_geometry_follows_from_inner_products():
    deltas, update = draw(3, 40).double(), draw(1, 40, seed=1).double()
    deltas[2] = 0
    products = inner_products(deltas)
    torch.testing.assert_close(norms(products), deltas.norm(dim=1))
    expected = torch.nn.functional.cosine_similarity(deltas[0], deltas[1], dim=0)
    found = cosines(products)
    torch.testing.assert_close(found[0, 1], expected)
    assert found[0, 0] == pytest.approx(1)
    assert found[2].isnan().all()
    found = distances(products, float(inner_products(update)), inner_products(deltas, update).squeeze(1))
    torch.testing.assert_close(found, (update - deltas).norm(dim=1))


def test_signs_by_counting():
    deltas = torch.randint(-1, 2, (4, 100_000), generator=torch.Generator().manual_seed(0)).float()
    moved, conflicts = sign_conflicts(deltas.reshape(4, 100, 1000))
    up, down = (deltas > 0).sum(dim=0), (deltas < 0).sum(dim=0)
    assert moved == int((up + down >= 2).sum())
    assert conflicts == int(((up > 0) & (down > 0)).sum())
    assert 0 < conflicts < moved < deltas.shape[1]


def test_signs_that_cannot_be_in_conflict():
    assert sign_conflicts(torch.tensor([[1.0, -2.0, 0.0]])) == (0, 0)
    assert sign_conflicts(torch.tensor([[1.0, -2.0, 0.0], [3.0, -1.0, 5.0]])) == (2, 0)
    assert sign_conflicts(torch.tensor([[1.0, -0.0], [-1e-30, 0.0]])) == (1, 1)
    assert sign_conflicts(torch.zeros(3, 0)) == (0, 0)
