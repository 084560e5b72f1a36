"""Small operations on tensors: precision, memory that is used again, finite values, shared storage."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor


def find_tied(places: Mapping[str, Hashable]) -> dict[str, str]:
    """Find the names that share a tensor, ``{alias: name}``, given where and how the values of each are laid out."""
    first: dict[Hashable, str] = {}
    owners = {key: first.setdefault(place, key) for key, place in places.items()}
    return {key: owner for key, owner in owners.items() if key != owner}


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the names of a state dict that share a tensor: ``{alias: name}``; empty tensors share nothing."""
    return find_tied(
        {
            key: (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            for key, tensor in state.items()
            if tensor.numel() and tensor.device.type != "meta"
        }
    )


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no entry of a tensor ``(…)`` is NaN or infinite; needs no memory besides the tensor."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        return bool(torch.isfinite(tensor.float()).all())
    low, high = tensor.aminmax()  # NaN wins in both
    return bool(torch.isfinite(low) & torch.isfinite(high))


class Scratch(threading.local):
    """Memory that every thread uses again and again, since new memory costs more than what is written there."""

    _memory: Tensor | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make a tensor of a shape with any content, in the memory of the last one that was asked for."""
        count = math.prod(shape)
        memory = self._memory
        if memory is None or memory.numel() < count or (memory.dtype, memory.device) != (dtype, device):
            self._memory = None  # before there is another
            self._memory = memory = torch.empty(count, dtype=dtype, device=device)
        return memory[:count].view(shape)

    def forget(self) -> None:
        """Give back this thread's memory."""
        self._memory = None

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()  # a copy has memory of its own


def wide(tensor: Tensor) -> Tensor:
    """Convert a tensor ``(…)`` to float32 unless it is float64: half precision is never computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
