"""Singular values, and how many directions they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

import lightning_merge as lm
from lightning_merge.analysis import effective_rank, energy_share, singular_values, stable_rank


def test_singular_values_are_those_of_lapack():
    matrices = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(singular_values(matrices), torch.linalg.svdvals(matrices))
    half = matrices[0, 0].bfloat16()
    torch.testing.assert_close(singular_values(half), torch.linalg.svdvals(half.float()), rtol=1e-5, atol=1e-5)
    assert singular_values(torch.full((3, 2), torch.nan)).isnan().all()


def test_effective_rank_is_the_exponential_of_the_entropy():
    s = torch.rand(5, 7, dtype=torch.float64)
    s[0, 3:] = 0
    np.testing.assert_allclose(effective_rank(s), [np.exp(entropy(row)) for row in s.numpy()])
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(2, 3)).tolist() == [0, 0]


def test_stable_rank_and_energy():
    s = torch.tensor([[4.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert stable_rank(s).tolist() == [1.5, 0]
    assert energy_share(s, 1)[0] == pytest.approx(2 / 3)
    assert energy_share(s, 9)[0] == 1
    assert energy_share(s, 0)[0] == 0
    assert energy_share(s, 1)[1].isnan()
    with pytest.raises(lm.MergeError, match="got -1"):
        energy_share(s, -1)
