"""What the costs of a merge are estimated from."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.merging.costs import Machine, estimate_seconds, matrix_seconds, measure_machine, reads_twice
from lightning_merge.methods import DARE, EMR, SCORE, SVC, TIES, TSVM, AdaMerging, IsoC, KnOTS, RegMean, WeightAverage

ONE = Machine(flops=1.0, eigh=1.0, bandwidth=1.0, hashing=1.0)


def test_a_machine_is_measured_and_left_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    machine = measure_machine()
    assert machine.flops > 1e6
    assert machine.bandwidth > 1e6
    assert machine.hashing > 1e6
    assert 0 < machine.eigh < 1
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_factorization_is_three_products_and_an_eigh(shape):
    once = 3 * 2 * 3 * 5 * 3 + 3**3
    assert matrix_seconds(IsoC(), *shape, 4, ONE) == once
    assert matrix_seconds(TSVM(), *shape, 4, ONE) == (4 + 2) * once
    assert matrix_seconds(SCORE(), *shape, 4, ONE) == (4 + 1) * once
    assert matrix_seconds(SVC(method=TSVM()), *shape, 4, ONE) == (1 + 4 + 2) * once
    assert matrix_seconds(WeightAverage(), *shape, 4, ONE) == 0


def test_time_is_shared_by_workers_where_it_is_arithmetic():
    def estimate(**changes):
        arguments = {"matrices": [(2, 3, 5)], "values": 30, "num_experts": 4, "itemsize": 4, "moved": 100, "hashed": 10}
        return estimate_seconds(IsoC(), **{**arguments, "workers": 1, **changes}, machine=ONE)

    alone = estimate()
    assert estimate(workers=2) == pytest.approx((alone - 100) / 2 + 100)
    assert estimate(moved=200) == pytest.approx(alone + 100)
    assert estimate(hashed=20) == pytest.approx(alone + 10)
    assert estimate(matrices=[(4, 3, 5)]) == pytest.approx(alone + 2 * matrix_seconds(IsoC(), 3, 5, 4, ONE))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (WeightAverage(), False),
        (RegMean(), False),
        (TIES(), True),
        (EMR(), True),
        (DARE(), False),
        (DARE(method=TIES()), True),
        (KnOTS(method=WeightAverage()), True),
        (AdaMerging(), True),
    ],
    ids=repr,
)
def test_which_methods_read_twice(method, expected):
    assert reads_twice(method) == expected
