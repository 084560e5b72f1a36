"""The samples that a sampler counts twice on several processes."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

import lightning_merge as lm
from lightning_merge.evaluation.beside.repeats import check_enough, without_repeats

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, None])
@pytest.mark.parametrize("wrapped", [True, False])
def test_every_sample_is_left_once(count, batch_size, wrapped):
    left = []
    for rank in range(count):
        if wrapped:  # as Lightning does
            sampler = DistributedSamplerWrapper(SequentialSampler(range(11)), count, rank, shuffle=False)
        else:
            sampler = DistributedSampler(range(11), count, rank, shuffle=False)
        batches = DataLoader(range(11), batch_size=batch_size, sampler=sampler)
        for i, batch in enumerate(batches):
            batch, is_left = without_repeats(batches, torch.as_tensor(batch), i)
            left += batch.reshape(-1).tolist() if is_left else []
    assert sorted(left) == list(range(11))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"x": torch.ones(3, 2), "names": ["a", "b", "c"], "n": 3}, {"x": (2, 2), "names": ["a", "b"], "n": 3}),
        (Pair(torch.ones(3), torch.ones(3, 3)), Pair((2,), (2, 3))),
        ([torch.ones(3), torch.ones(3), torch.ones(3)], [(2,), (2,), (2,)]),
        ((["a", "b", "c"], ({"x": torch.ones(3)},)), (["a", "b"], ({"x": (2,)},))),
        ([torch.ones(2), torch.ones(5), torch.ones(4)], [(2,), (5,)]),
        ([{"a": 1}, {"a": 2}, {"a": 3}], [{"a": 1}, {"a": 2}]),
    ],
)
def test_whatever_a_batch_is(batch, expected):
    def shapes(found):
        if isinstance(found, torch.Tensor):
            return tuple(found.shape)
        if isinstance(found, dict):
            return {k: shapes(v) for k, v in found.items()}
        if isinstance(found, (list, tuple)):
            parts = [shapes(part) for part in found]
            return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)
        return found

    sampler = DistributedSampler(range(5), 2, rank=1, shuffle=False)  # positions 1, 3 and a repeat
    assert shapes(without_repeats(DataLoader(range(5), 3, sampler=sampler), batch, 0)[0]) == expected


def test_a_batch_that_holds_nothing_of_its_length():
    loader = DataLoader(range(5), 3, sampler=DistributedSampler(range(5), 2, rank=1, shuffle=False))
    with pytest.raises(lm.MergeError, match="a number of processes that divides"):
        without_repeats(loader, SimpleNamespace(x=torch.ones(3)), 0)


def test_other_samplers_are_left_alone():
    class Sampler(DistributedSampler):
        """Repeats nothing."""

    loader = DataLoader(range(5), 3, sampler=Sampler(range(5), 2, rank=1, shuffle=False))
    batch = torch.ones(3)
    assert without_repeats(loader, batch, 0) == (batch, True)
    assert without_repeats(DataLoader(range(5), 3), batch, 0) == (batch, True)


def test_more_processes_than_samples():
    class Two(Dataset):
        def __len__(self):
            return 2

    loader = DataLoader(Two(), sampler=DistributedSampler(Two(), 3, rank=0))
    with pytest.raises(lm.MergeError, match="cannot share out 2 samples over 3 processes"):
        check_enough([loader], "It")
