"""Batches are the same on any number of processes."""

from __future__ import annotations

import pytest

from lightning_merge.data.batches import GlobalBatches
from lightning_merge.utilities.errors import MergeError


def batches(total: int, size: int, shuffle: bool, processes: int, epoch: int = 0) -> list[list[list[int]]]:
    """For every process its part of every batch."""
    parts = []
    for rank in range(processes):
        sampler = GlobalBatches(range(total), size, shuffle, num_replicas=processes, rank=rank, seed=3)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    return parts


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize(("total", "size"), [(100, 8), (97, 8), (9, 8), (8, 8), (7, 8), (4, 100), (5, 4), (100, 4)])
def test_evaluation_sees_every_sample_once_in_even_steps(total, size, processes):
    parts = batches(total, size, False, processes)
    assert len({len(part) for part in parts}) == 1
    assert all(batch for part in parts for batch in part)
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(total))
    sizes = [len(batch) for part in parts for batch in part]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("processes", [2, 4])
def test_training_batches_do_not_depend_on_the_number_of_processes(processes):
    (alone,) = batches(100, 8, True, 1, epoch=5)
    together = batches(100, 8, True, processes, epoch=5)
    for step, batch in enumerate(alone):
        assert sorted(i for part in together for i in part[step]) == sorted(batch)
        assert len({len(part[step]) for part in together}) == 1


def test_every_epoch_has_another_order_and_the_same_seed_the_same():
    assert batches(50, 8, True, 1, epoch=0) != batches(50, 8, True, 1, epoch=1)
    assert batches(50, 8, True, 1, epoch=1) == batches(50, 8, True, 1, epoch=1)


def test_a_training_set_smaller_than_a_batch_is_one_batch():
    (part,) = batches(5, 8, True, 1)
    assert [len(batch) for batch in part] == [5]


def test_training_batches_that_cannot_be_shared_out_evenly():
    with pytest.raises(MergeError, match="Batches of 8 cannot be shared out evenly over 3 processes"):
        GlobalBatches(range(100), 8, True, num_replicas=3, rank=0)


@pytest.mark.parametrize(("total", "size"), [(2, 8), (100, 2)])
def test_fewer_samples_than_processes(total, size):
    with pytest.raises(MergeError, match="cannot be shared out over 3 processes"):
        GlobalBatches(range(total), size, False, num_replicas=3, rank=0)
