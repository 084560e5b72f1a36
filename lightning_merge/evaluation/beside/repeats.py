"""The samples that Lightning's sampler counts twice in an evaluation on several processes.

It gives every process the same number of samples, and where that does not come out even, some of the first samples are
given out again at the end. Process ``r`` of ``N`` has as its sample ``j`` the one at position ``r + j N``; positions
from the number of samples on are repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_merge.utilities.errors import MergeError


def loaders_of(trainer: Trainer) -> list[Any]:
    """Return the loaders of the evaluation that a trainer is in."""
    loops = {
        TrainerFn.FITTING: trainer.fit_loop.epoch_loop.val_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,  # after a fit, ``trainer.val_dataloaders`` is still the fit's
        TrainerFn.TESTING: trainer.test_loop,
    }
    return list(loops[trainer.state.fn]._combined_loader.flattened)


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
        batch: Tensors and sequences of one entry a sample, in tuples, lists, mappings.
        batch_idx: Its index.

    Returns:
        What is left, and whether anything is.

    Raises:
        MergeError: If the samples of the batch cannot be told apart.
    """
    sampler = _padding_sampler(loader)
    if sampler is None:
        return batch, True
    batch_size = loader.batch_sampler.batch_size if loader.batch_sampler is not None else 1
    start = batch_idx * batch_size
    size = min(batch_size, sampler.num_samples - start)
    own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
    kept = max(min(own - start, size), 0)
    if kept in (0, size):
        return batch, kept > 0
    shortened = _first(batch, kept, size)
    if shortened is batch:
        raise MergeError(
            f"A batch of {size} samples, some of them repeated so that every process has as many, holds no tensor or "
            "list of that length to leave them out of; use a number of processes that divides the number of samples."
        )
    return shortened, True


def _padding_sampler(loader: Any) -> DistributedSampler | None:
    sampler = getattr(loader, "sampler", None)
    pads = type(sampler) in (DistributedSampler, DistributedSamplerWrapper) and not sampler.drop_last
    known = getattr(loader, "batch_sampler", None) is None or hasattr(loader.batch_sampler, "batch_size")
    return sampler if pads and known else None


def _first(found: Any, kept: int, size: int) -> Any:
    """Return the first entries of whatever has one for each sample; the very same object where nothing has."""
    if isinstance(found, Tensor):
        return found[:kept] if found.dim() and len(found) == size else found
    if isinstance(found, Mapping):
        new = {key: _first(value, kept, size) for key, value in found.items()}
        same = all(new[key] is value for key, value in found.items())
        return found if same else new if type(found) is dict else type(found)(new)
    if not isinstance(found, (list, tuple)):
        return found
    if len(found) == size and not all(_length(part) == size for part in found):
        return found[:kept]
    parts = [_first(part, kept, size) for part in found]
    if all(new is part for new, part in zip(parts, found, strict=True)):
        return found
    return type(found)(*parts) if hasattr(found, "_fields") else type(found)(parts)


def _length(part: Any) -> int | None:
    """How many samples a part of a batch has, if it can be told."""
    if isinstance(part, Mapping):
        return next((length for value in part.values() if (length := _length(value)) is not None), None)
    if isinstance(part, Tensor):
        return len(part) if part.dim() else None
    return len(part) if isinstance(part, (list, tuple)) else None
