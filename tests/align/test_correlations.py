"""Running correlations against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_merge.align import CrossMoments, correlations

A = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) + 100
B = A @ torch.randn(4, 5, generator=torch.Generator().manual_seed(1)) + 1e3


def moments(*parts: slice) -> CrossMoments:
    found = CrossMoments.empty(4, 5)
    for part in parts:
        found.update(A[part], B[part])
    return found


def test_correlations_are_those_of_numpy():
    expected = np.corrcoef(A.double().numpy(), B.double().numpy(), rowvar=False)[:4, 4:]
    np.testing.assert_allclose(moments(slice(0, 60)).correlation().numpy(), expected, atol=1e-10)


def test_any_division_of_the_samples_gives_the_same(monkeypatch):
    whole = moments(slice(0, 60))
    in_batches = moments(slice(0, 1), slice(1, 33), slice(33, 33), slice(33, 60))
    one, two, nothing = moments(slice(0, 7)), moments(slice(7, 60)), CrossMoments.empty(4, 5)
    two.merge(nothing)
    nothing.merge(one)
    nothing.merge(two)
    monkeypatch.setattr(correlations, "CHUNK", 12)
    for found in (in_batches, nothing, moments(slice(0, 60))):
        for name in ("count", "mean_a", "mean_b", "squares_a", "squares_b", "products"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-10, atol=1e-8)


def test_units_that_do_not_vary_correlate_with_nothing():
    a = torch.randn(50, 3)
    a[:, 0], a[:, 1] = 0.0, 7.3 + 1e-7 * torch.randn(50)  # dead, and constant up to rounding
    found = CrossMoments.empty(3)
    found.update(a[:20], a[:20])
    found.update(a[20:], a[20:])
    correlation = found.correlation()
    assert torch.equal(correlation[:2], torch.zeros(2, 3))
    assert torch.equal(correlation[:, :2], torch.zeros(3, 2))
    assert float(correlation[2, 2]) == pytest.approx(1)
    assert torch.equal(CrossMoments.empty(3).correlation(1e-4), torch.zeros(3, 3))


def test_epsilon_is_that_of_repair():
    found = moments(slice(0, 60))
    a, b = A.double(), B.double()
    covariance = (a - a.mean(0)).T @ (b - b.mean(0)) / 60
    expected = covariance / (torch.outer(a.std(0, correction=0), b.std(0, correction=0)) + 1e-4)
    torch.testing.assert_close(found.correlation(1e-4), expected, rtol=1e-9, atol=1e-12)
