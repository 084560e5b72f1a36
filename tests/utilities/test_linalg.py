"""Factorizations against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lightning_merge.utilities.linalg import above, gram, isotropize, paths_taken, polar, polar_by_products, svd
from lightning_merge.utilities.tensors import is_finite

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


def with_spectrum(m: int, n: int, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix with about these singular values, and its polar factor in float64."""
    rng = np.random.default_rng(1)
    U, V = (scipy.linalg.qr(rng.normal(size=(size, min(m, n))), mode="economic")[0] for size in (m, n))
    X = (U * s @ V.T).astype(np.float32)
    return X, scipy.linalg.polar(X.astype(np.float64))[0]


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("condition", [3.0, 300.0, 3e4])
def test_float32_loses_no_more_than_an_svd_in_float32(shape, condition):
    X, expected = with_spectrum(*shape, np.geomspace(1, 1 / condition, 64))
    U, _, Vt = np.linalg.svd(X, full_matrices=False)
    rounding = np.linalg.norm(expected.astype(np.float32) - expected)
    error = np.linalg.norm(polar(torch.tensor(X)).numpy() - expected)
    assert error <= max(np.linalg.norm(U @ Vt - expected), 20 * rounding)
    assert error < 1e-4


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_leading_triplets_of_float32(rank):
    X, _ = with_spectrum(96, 64, 1 / np.arange(1.0, 65))
    U, s, Vt = (part.numpy() for part in svd(torch.tensor(X), rank))
    best = np.linalg.svd(X.astype(np.float64), full_matrices=False)
    expected = best[0][:, :rank] * best[1][:rank] @ best[2][:rank]
    np.testing.assert_allclose(U * s @ Vt, expected, atol=1e-6)
    np.testing.assert_allclose(s, best[1][:rank], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_low_rank_stays_low_rank(dtype):
    X = (torch.randn(40, 3, dtype=dtype) @ torch.randn(3, 30, dtype=dtype)).to(dtype)
    singular_values = torch.linalg.svdvals(polar(X))
    torch.testing.assert_close(singular_values[:3], torch.ones(3, dtype=dtype))
    assert float(singular_values[3]) < 1e-5


@pytest.mark.parametrize("n", [8, 256, 300])
def test_gram_matrices_are_symmetric_and_in_float64(n):
    X = torch.randn(2, 310, n)
    G = gram(X)
    torch.testing.assert_close(G, torch.einsum("bmi,bmj->bij", X.double(), X.double()), rtol=0, atol=1e-10)
    torch.testing.assert_close(G, G.mT, rtol=0, atol=1e-12)


def test_it_is_told_how_a_matrix_was_decomposed():
    well, badly = torch.randn(30, 10, dtype=torch.float64), torch.ones(30, 10, dtype=torch.float64)
    with paths_taken() as paths:
        polar(well)
        svd(badly.float(), 3)
        assert paths == {"gram": 2}
        svd(badly)
    assert paths == {"gram": 3, "svd": 1}
    polar(well)
    assert paths == {"gram": 3, "svd": 1}


class TestProducts:
    """What a GPU does, here on the CPU."""

    @pytest.mark.parametrize("condition", [2.0, 30.0])
    def test_they_converge_to_the_polar_factor(self, condition):
        X, expected = with_spectrum(96, 64, np.geomspace(1, 1 / condition, 64))
        found, converged = polar_by_products(torch.tensor(X).expand(2, 96, 64))
        assert converged
        np.testing.assert_allclose(found[1], expected, atol=1e-5)

    def test_they_say_when_they_do_not(self):
        X, _ = with_spectrum(96, 64, np.geomspace(1, 1e-6, 64))
        assert not polar_by_products(torch.tensor(X))[1]
        assert not polar_by_products(torch.ones(9, 4))[1]
        assert not polar_by_products(torch.zeros(9, 4))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False)])
def test_finite(dtype, value, finite):
    assert is_finite(torch.tensor([0.5, value]).to(dtype)) is finite


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite(value):
    assert not is_finite(torch.tensor([0.5, value]))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([1, 2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is at hand")
@pytest.mark.parametrize("condition", [3.0, 3e4])
def test_a_gpu_gives_what_the_cpu_gives(condition):
    X, expected = with_spectrum(96, 64, np.geomspace(1, 1 / condition, 64))
    np.testing.assert_allclose(polar(torch.tensor(X, device="cuda")).cpu(), expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0), (0, 2, 2), (0, 0)])
def test_a_matrix_without_entries(shape):
    matrices = torch.zeros(shape)
    U, s, Vt = svd(matrices)
    assert torch.equal((U * s.unsqueeze(-2)) @ Vt, matrices)
    assert svd(torch.ones(3, 2), 0)[1].shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-41),
        (torch.float32, 1e30),
        (torch.float64, 1e-310),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ],
)
def test_matrices_of_any_size(dtype, size):
    X = torch.randn(7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = (X * size).to(dtype)
    U, s, Vt = svd(matrix)
    assert torch.allclose((s / size).double(), torch.linalg.svdvals(X), rtol=1e-3)
    assert torch.allclose(((U * (s / size)) @ Vt).double(), X, atol=1e-3)
    assert torch.allclose(polar(matrix).double(), polar(X), atol=1e-3)
    assert torch.allclose((isotropize(matrix) / size).double(), isotropize(X), atol=1e-3)


@pytest.mark.parametrize(
    ("values", "threshold", "kept"),
    [
        ([3.0, 1e-3, 0.0], 1e-2, [True, False, False]),
        ([3e-3, 1e-3, 1e-6, 0.0], 1e-2, [True, True, False, False]),
        ([3e-3, 1e-3], 10.0, [False, False]),
        ([0.0, 0.0], 1e-5, [False, False]),
        ([], 1e-5, []),
    ],
)
def test_singular_values_above_a_threshold(values, threshold, kept):
    assert above(torch.tensor(values), threshold).tolist() == kept
