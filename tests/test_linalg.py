"""Factorizations against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lightning_merge.linalg import isotropize, polar, svd

SHAPES = [(9, 5), (5, 9), (6, 6), (1, 4), (7, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_against_scipy(shape, dtype):
    X = torch.randn(3, *shape, dtype=dtype)
    U, s, Vt = svd(X)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for i in range(3):
        np.testing.assert_allclose(s[i], scipy.linalg.svdvals(X[i].numpy()), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close((U * s.unsqueeze(-2)) @ Vt, X, rtol=0, atol=tolerance)
    largest = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_triplets_are_the_first_of_all(shape):
    X = torch.randn(2, *shape, dtype=torch.float64)
    for part, whole in zip(svd(X, 1), svd(X), strict=True):
        torch.testing.assert_close(
            part.flatten(), whole[tuple(slice(n) for n in part.shape)].flatten(), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_against_scipy(shape):
    X = torch.randn(2, *shape, dtype=torch.float64)
    for i in range(2):
        factor, s = scipy.linalg.polar(X[i].numpy())[0], scipy.linalg.svdvals(X[i].numpy())
        np.testing.assert_allclose(polar(X)[i], factor, atol=1e-10)
        np.testing.assert_allclose(isotropize(X)[i], factor * s.mean(), atol=1e-10)


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9])
def test_badly_conditioned_matrices_keep_their_precision(condition):
    rng = np.random.default_rng(0)
    U, V = (scipy.linalg.qr(rng.normal(size=(n, n)))[0] for n in (30, 20))
    X = U[:, :20] * np.geomspace(1, 1 / condition, 20) @ V.T
    np.testing.assert_allclose(polar(torch.tensor(X)), U[:, :20] @ V.T, atol=1e-15 * condition * 20 + 1e-8)


def test_null_space_contributes_nothing():
    X = torch.zeros(6, 4, dtype=torch.float64)
    X[:, 0] = torch.randn(6, dtype=torch.float64)
    X[:, 1] = 2 * X[:, 0]
    factor = polar(X)
    assert bool((factor[:, 2:].abs() < 1e-12).all())
    torch.testing.assert_close(torch.linalg.svdvals(factor), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    U, s, Vt = svd(X)
    assert bool((s[1:] == 0).all())
    assert bool((U[:, 1:] == 0).all())
    assert bool((Vt[1:] == 0).all())


def test_a_matrix_of_zeros_stays_zero():
    assert not polar(torch.zeros(3, 4, dtype=torch.float64)).any()
