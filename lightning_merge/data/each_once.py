"""The samples of any project's loaders, for what must not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from lightning_merge.data.batches import batch_loader
from lightning_merge.utilities.processes import processes_of_run


def each_once(loaders: Any) -> Iterable[Any]:
    """Iterate over the samples of any project's loaders, each once and in order, whatever the number of processes.

    Every process gets its part of every batch. Nothing is dropped or shuffled, nor repeated so that all processes have
    the same number of samples (as Lightning's distributed sampler does). A sampler of the project's own is asked once
    which samples it takes. Streams, and loaders with batches of their own making, are read as they are.

    Args:
        loaders: What a ``train_dataloader`` or ``val_dataloader`` gives: a loader, or several, one after another.

    Raises:
        MergeError: If there are fewer samples than processes.
    """
    processes = processes_of_run().count
    several = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    if isinstance(several, Sequence) and any(isinstance(loader, DataLoader) for loader in several):
        return chain.from_iterable([each_once(loader) for loader in several])
    if not _can_be_read_anew(loaders):
        if processes > 1:
            rank_zero_warn(
                "The data are a stream, or have batches of their own making, and are read as each process gets them: a "
                "sample that two processes get counts twice."
            )
        return loaders
    order = _own_order(loaders.sampler)
    dataset = loaders.dataset if order is None else Subset(loaders.dataset, order)
    size = max(loaders.batch_sampler.batch_size, processes)
    collate, init = loaders.collate_fn, loaders.worker_init_fn
    return batch_loader(dataset, size, False, loaders.num_workers, collate=collate, worker_init=init)


def _can_be_read_anew(loader: Any) -> bool:
    """Tell whether the samples of a loader can be put into other batches than its own."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and (
            type(loader.sampler) is DistributedSampler or not isinstance(_unwrapped(loader.sampler), DistributedSampler)
        )
    )


def _unwrapped(sampler: Sampler | Iterable[int]) -> Any:
    """Return the project's own sampler, inside what Lightning made of it to share it out."""
    if type(sampler) is not DistributedSamplerWrapper:
        return sampler
    return sampler.dataset._sampler  # type: ignore[attr-defined]  # Lightning does not say what its data set is


def _own_order(sampler: Sampler | Iterable[int]) -> list[int] | None:
    """List the indices that a sampler takes, in ascending order; None if it takes all."""
    unwrapped = _unwrapped(sampler)
    if type(unwrapped) in (SequentialSampler, DistributedSampler):
        return None
    if type(unwrapped) is RandomSampler and not unwrapped.replacement and len(unwrapped) == len(unwrapped.data_source):
        return None
    generators = [value for value in vars(unwrapped).values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng([]):
        for generator in (torch.default_generator, *generators):
            generator.manual_seed(0)  # so that all processes draw the same
        try:
            return sorted(islice(unwrapped, len(unwrapped)))
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
