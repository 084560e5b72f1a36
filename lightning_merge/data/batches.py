"""Batches that are the same on any number of processes.

A sampler yields whole batches (lists of indices), and each process takes its part of every batch. So the optimizer
sees the same batches on 1 and on N processes, no sample is counted twice in an evaluation, and every process has the
same number of steps, which BatchNorm under DDP needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from lightning_merge.utilities.errors import MergeError

Collate = Callable[[list[Any]], Any]


class GlobalBatches(DistributedSampler):
    """Sampler of this process's part of every batch. Lightning leaves any ``DistributedSampler`` as it is.

    Args:
        dataset: What is sampled from.
        batch_size: Samples of a batch, over all processes.
        shuffle: Draw a new order each epoch, and drop the samples that do not fill the last batch, as training does.
            Otherwise keep the order and every sample, in batches of even size.
        num_replicas: Number of processes; by default that of the process group, or 1.
        rank: Which process this is.
        seed: Seed of the order; by default that of ``seed_everything``.

    Raises:
        MergeError: If there are fewer samples in a batch than processes.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        shuffle: bool,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int | None = None,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            dataset,  # type: ignore[arg-type]  # torch reads its length only
            num_replicas=num_replicas or (torch.distributed.get_world_size() if distributed else 1),
            rank=rank if rank is not None else (torch.distributed.get_rank() if distributed else 0),
            shuffle=shuffle,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed,
        )
        total = len(dataset)
        if total < self.num_replicas or batch_size < self.num_replicas:
            raise MergeError(
                f"{total} samples in batches of {batch_size} cannot be shared out over {self.num_replicas} processes; "
                "use fewer processes or a larger batch_size."
            )
        if shuffle and batch_size % self.num_replicas:
            raise MergeError(
                f"Batches of {batch_size} cannot be shared out evenly over {self.num_replicas} processes; choose a "
                "batch_size that they divide."
            )
        if shuffle:
            size = min(batch_size, total)
            size -= size % self.num_replicas  # equal parts, so that the mean of the gradients is the batch's gradient
            self.bounds = [(start, start + size) for start in range(0, total - size + 1, size)]
        else:
            count = min(-(-total // batch_size), total // self.num_replicas)  # something of each for every process
            self.bounds = [(i * total // count, (i + 1) * total // count) for i in range(count)]

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[int]]:
        total = len(self.dataset)  # type: ignore[arg-type]  # it is the sized one of __init__
        if self.shuffle:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        else:
            order = list(range(total))
        for start, end in self.bounds:
            yield order[start + self.rank : end : self.num_replicas]


class _Batched(Dataset):
    """A data set that is indexed by a list of indices and returns the collated batch."""

    def __init__(self, dataset: Dataset, collate: Collate = default_collate) -> None:
        self.dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's class has none, its samplers want one

    def __getitem__(self, indices: list[int]) -> Any:
        return self._collate([self.dataset[i] for i in indices])


def batch_loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool,
    num_workers: int,
    shared: bool = True,
    collate: Collate = default_collate,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader:
    """Build the loader of :class:`GlobalBatches` over a data set of single samples.

    Args:
        dataset: The samples.
        batch_size: Samples of a batch, over all processes.
        shuffle: Whether it is for training.
        num_workers: Processes that read samples.
        shared: Give each process its part of every batch; otherwise every process gets all of it.
        collate: Makes a batch of a list of samples.
        worker_init: Called in every process that reads samples.
    """
    processes = {} if shared else {"num_replicas": 1, "rank": 0}
    return DataLoader(
        _Batched(dataset, collate),
        batch_size=None,
        sampler=GlobalBatches(dataset, batch_size, shuffle, **processes),  # type: ignore[arg-type]  # as in _Batched
        num_workers=num_workers,
        worker_init_fn=worker_init,
        persistent_workers=num_workers > 0 and shuffle,
        pin_memory=torch.cuda.is_available(),
    )
