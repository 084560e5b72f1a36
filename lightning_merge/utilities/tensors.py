"""Small operations on tensors: precision, memory that is used again, shared storage, numbers of any size."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

LARGE = 2.0**40
"""Where numbers begin whose squares, or sums of squares, may be beyond float32."""


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
    return not tensor.is_floating_point() or math.isfinite(largest_magnitude(tensor))


def without_masks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Copy ``a (…)`` and ``b (…)`` with zeros where both are infinite and equal, as in an attention mask."""
    masked = a.isinf() & (a == b)
    return a.masked_fill(masked, 0), b.masked_fill(masked, 0)


def largest_magnitude(tensor: Tensor) -> float:
    """Find the largest magnitude in a tensor ``(…)``, NaN being the largest; 0 where it is empty."""
    if not tensor.numel():
        return 0.0
    if tensor.element_size() == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # NaN wins in both
    return float(torch.maximum(low.abs(), high.abs()))


def unit_exponent(largest: float) -> int:
    """Choose the exponent of the power of two that brings numbers to about 1, where squares would leave their range.

    Args:
        largest: Their largest magnitude.

    Returns:
        0 for all ordinary numbers, whose squares and sums of squares float32 holds; and for what has no size.
    """
    if largest == 0 or not math.isfinite(largest) or 1 / LARGE <= largest <= LARGE:
        return 0
    return -math.frexp(largest)[1]


def times_power(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply a tensor ``(…)`` by a power of two, exactly: in two steps, as the power itself may be out of range."""
    return tensor if exponent == 0 else tensor * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def homogeneous(rule: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """Compute a rule that commutes with scaling, ``(…) -> (…)``, on numbers of about 1, see :func:`unit_exponent`."""

    @wraps(rule)
    def scaled(tensor: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        exponent = unit_exponent(largest_magnitude(tensor))
        return times_power(rule(times_power(tensor, exponent), *args, **kwargs), -exponent)

    return scaled


def mean(stack: Tensor) -> Tensor:
    """Compute the mean over the first dimension, ``(T, …) -> (…)``, also where the sum is beyond the largest number."""
    result = stack.mean(dim=0)
    return result if is_finite(result) else (stack / len(stack)).sum(dim=0)


def norm(vectors: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """Compute norms as ``torch.linalg.vector_norm`` does, also where the squares are beyond the largest number."""
    norms = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    if not is_finite(norms):
        size = vectors.abs().amax(dim=dim, keepdim=True)
        size = torch.where(size > 0, size, 1)
        norms = norms.where(norms.isfinite(), size * torch.linalg.vector_norm(vectors / size, dim=dim, keepdim=True))
    return norms if keepdim else norms.squeeze(dim)


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
