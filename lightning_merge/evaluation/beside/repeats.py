"""The samples that Lightning's sampler counts twice in an evaluation on several processes.

It gives every process the same number of samples, and where that does not come out even, some of the first samples are
given out again at the end. Process ``r`` of ``N`` has as its sample ``j`` the one at position ``r + j N``; positions
from the number of samples on are repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any, Protocol

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_merge.utilities.errors import MergeError


class _PaddingSampler(Protocol):
    """A sampler of torch or Lightning that gives some samples out twice."""

    dataset: Sized
    num_replicas: int
    num_samples: int
    rank: int


def loaders_of(trainer: Trainer) -> list[Any]:
    """List the loaders of the evaluation that a trainer is in."""
    combined = trainer._evaluation_loop._combined_loader  # after a fit, ``trainer.val_dataloaders`` is still the fit's
    assert combined is not None  # an evaluation begins with it
    return list(combined.flattened)


def check_enough(loaders: Sequence[Any], who: str) -> None:
    """Raise a :class:`MergeError` if there are more processes than samples."""
    for loader in loaders:
        sampler = _padding_sampler(loader)
        if sampler is not None and len(sampler.dataset) < sampler.num_replicas:
            raise MergeError(
                f"{who} cannot share out {len(sampler.dataset)} samples over {sampler.num_replicas} processes; use "
                "fewer processes."
            )


def without_repeats(loader: Any, batch: Any, batch_idx: int) -> tuple[Any, bool]:
    """Leave out of a batch what another process has counted before.

    Args:
        loader: The loader that the batch is from.
        batch: Tensors ``(N, …)`` and sequences of one entry per sample, in tuples, lists, mappings.
        batch_idx: Its index.

    Returns:
        The samples that are left, and whether there are any.

    Raises:
        MergeError: If the samples of the batch cannot be told apart.
    """
    sampler = _padding_sampler(loader)
    if sampler is None:
        return batch, True
    batch_size = loader.batch_sampler.batch_size if loader.batch_sampler is not None else 1
    start = batch_idx * batch_size
    size = min(batch_size, sampler.num_samples - start)
    distinct = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
    kept = max(min(distinct - start, size), 0)
    if kept in (0, size):
        return batch, kept > 0
    shortened = _first(batch, kept, size)
    if shortened is batch:
        raise MergeError(
            f"A batch of {size} samples, some of them repeated so that every process has as many, holds no tensor or "
            "list of that length to leave them out of; use a number of processes that divides the number of samples."
        )
    return shortened, True


def _padding_sampler(loader: Any) -> _PaddingSampler | None:
    """Return the sampler of a loader if it repeats samples, and if the size of the batches is known."""
    sampler: Any = getattr(loader, "sampler", None)
    pads = type(sampler) in (DistributedSampler, DistributedSamplerWrapper) and not sampler.drop_last
    has_size = getattr(loader, "batch_sampler", None) is None or hasattr(loader.batch_sampler, "batch_size")
    return sampler if pads and has_size else None


def _first(batch: Any, kept: int, size: int) -> Any:
    """Return the first entries of whatever has one for each sample; the very same object where nothing has."""
    kind: Any = type(batch)
    if isinstance(batch, Tensor):
        return batch[:kept] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        new = {key: _first(value, kept, size) for key, value in batch.items()}
        same = all(new[key] is value for key, value in batch.items())
        return batch if same else new if kind is dict else kind(new)
    if not isinstance(batch, (list, tuple)):
        return batch
    if len(batch) == size and not all(_length(part) == size for part in batch):
        return batch[:kept]
    parts = [_first(part, kept, size) for part in batch]
    if all(new is part for new, part in zip(parts, batch, strict=True)):
        return batch
    return kind(*parts) if hasattr(batch, "_fields") else kind(parts)


def _length(part: Any) -> int | None:
    """Count the samples of a part of a batch, if it can be told how many there are."""
    if isinstance(part, Mapping):
        return next((length for value in part.values() if (length := _length(value)) is not None), None)
    if isinstance(part, Tensor):
        return len(part) if part.dim() else None
    return len(part) if isinstance(part, (list, tuple)) else None
