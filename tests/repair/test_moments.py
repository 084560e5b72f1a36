"""Moments against numpy, in any order, on any number of processes; moving averages as Flax keeps them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_merge.repair import Moments
from lightning_merge.utilities.errors import MergeError
from lightning_merge.utilities.processes import Processes
from tests.utilities.test_processes import on_processes


def rows(count: int = 50) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 1e4


@pytest.mark.parametrize("sizes", [[50], [1, 49], [20, 0, 7, 23]])
def test_moments_are_those_of_numpy_however_the_rows_are_parted(sizes):
    x = rows()
    one, other = Moments(), Moments()
    for number, part in enumerate(x.split(sizes)):
        (one if number % 2 else other).update(part)
    one.merge(other)
    assert one.count == 50
    np.testing.assert_allclose(one.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(one.variance, x.numpy().var(0), rtol=1e-9)
    np.testing.assert_allclose(one.std, x.numpy().std(0), rtol=1e-9)


def test_whole_numbers_do_not_overflow():
    x = torch.tensor([[250], [251], [252]], dtype=torch.uint8)
    moments = Moments()
    moments.update(x)
    assert moments.mean.item() == 251
    assert moments.variance.item() == pytest.approx(2 / 3)
    assert x.dtype == torch.uint8


def test_counts_beyond_64_bits_are_merged():
    one = Moments.of(rows())
    one.count = 2**70
    one.merge(Moments.of(rows(4)))
    assert one.count == 2**70 + 4
    assert one.is_finite


def test_moving_averages_are_those_of_flax():
    moments, mean, variance = Moments(momentum=0.9), np.zeros(3), np.ones(3)
    for part in rows().float().split(10):
        moments.update(part)
        mean = 0.9 * mean + 0.1 * part.double().numpy().mean(0)
        variance = 0.9 * variance + 0.1 * part.double().numpy().var(0)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-12)


def test_two_processes_have_the_moments_of_one():
    x = rows()

    def work(rank: int):
        moments = Moments()
        moments.update(x[rank::2][: 25 if rank else 11])
        whole = moments.gathered(Processes(distributed=True))
        return whole.count, whole.mean.tolist(), whole.variance.tolist()

    found, errors = on_processes(2, work)
    assert errors == [None, None]
    seen = torch.cat([x[0::2][:11], x[1::2]])
    for count, mean, variance in found:
        assert count == len(seen)
        np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-14)
        np.testing.assert_allclose(variance, seen.var(0, correction=0), rtol=1e-9)


def test_what_is_not_there_is_said():
    with pytest.raises(MergeError, match="no mean of no values"):
        _ = Moments().mean
    with pytest.raises(MergeError, match="no variance of 1 value a channel"):
        _ = Moments.of(rows(1)).variance
    with pytest.raises(MergeError, match="momentum must be"):
        Moments(momentum=1.0)
    assert not Moments.of(torch.tensor([[1.0], [float("inf")]])).is_finite
