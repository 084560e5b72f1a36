"""Every sample of any project's loaders is read once, whatever the number of processes."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_merge.data.batches import GlobalBatches
from lightning_merge.data.each_once import each_once
from tests.utilities.test_processes import on_processes

fork = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
LOOKED_AT = [11, 3, 5, 7, 2]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


def read(loaders) -> list[int]:
    return [int(i) for batch in each_once(loaders) for i in batch]


def padded(n: int) -> DistributedSampler:
    """What Lightning puts into a training loader of three processes."""
    return DistributedSampler(range(n), num_replicas=3, rank=0)


def test_nothing_is_dropped_shuffled_or_repeated():
    loaders = [DataLoader(range(13), 5, shuffle=True, drop_last=True), DataLoader(range(13), 5, sampler=padded(13))]
    for loader in loaders:
        assert read(loader) == list(range(13))
    assert read({"a": loaders[0], "b": loaders[1]}) == [*range(13), *range(13)]


def test_the_project_s_own_sampler_says_which():
    own = SubsetRandomSampler(LOOKED_AT)
    for sampler in (own, DistributedSamplerWrapper(own, num_replicas=3, rank=1)):
        assert read(DataLoader(range(13), 2, sampler=sampler)) == sorted(LOOKED_AT)
    some = torch.utils.data.RandomSampler(range(13), num_samples=4)
    assert len(read(DataLoader(range(13), 2, sampler=some))) == 4


def test_the_project_s_own_collation_is_used():
    loader = DataLoader(range(5), 2, collate_fn=lambda samples: [-sample for sample in samples])
    assert read(loader) == [0, -1, -2, -3, -4]


def test_what_has_batches_of_its_own_making_is_read_as_it_is():
    class Own(BatchSampler):
        def __iter__(self):
            yield [4, 4]

    batches = DataLoader(range(5), batch_sampler=Own(SequentialSampler(range(5)), 2, False))
    parts = DataLoader(range(5), batch_size=None, sampler=GlobalBatches(range(5), 2, False))
    for loader in (DataLoader(Stream(), 2), batches, parts, [[1, 2], [3]]):
        assert each_once(loader) is loader


@fork
def test_processes_share_the_samples_out():
    def work(rank: int) -> list[int]:
        random = DataLoader(range(13), 5, sampler=SubsetRandomSampler(LOOKED_AT))
        return read([DataLoader(range(7), 2, shuffle=True), random])

    found, errors = on_processes(3, work)
    assert errors == [None] * 3
    assert sorted(i for part in found for i in part) == sorted([*range(7), *LOOKED_AT])


@fork
def test_more_processes_than_samples_are_refused_and_streams_warned_of():
    def work(rank: int) -> None:
        if rank == 0:
            with pytest.warns(UserWarning, match="a sample that two processes get counts twice"):
                each_once(DataLoader(Stream()))
        each_once(DataLoader(range(2), 8))

    _, errors = on_processes(3, work)
    assert all("2 samples in batches of 8 cannot be shared out over 3 processes" in error for error in errors)
