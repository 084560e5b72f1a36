"""Radix selection: an order statistic in a fixed number of passes over the data, whatever they are like."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Chunks = Callable[[], Iterable[Tensor]]
"""Called once per pass over the data; yields tensors ``(T, …)``, all float32 or all float64."""

INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
"""The integers that hold the bits of a float."""

_DIGIT = 16
"""Bits that are settled in one pass over the data."""


def ordered(bits: Tensor) -> Tensor:
    """Map the bit patterns ``(…)`` of floats to signed integers in the order of the floats; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def select(
    chunks: Chunks,
    target: Callable[[Tensor], Tensor],
    weight: Callable[[Tensor], Tensor] | None = None,
    signed: bool = False,
) -> Tensor:
    """Find the smallest value per row up to which the cumulative weight exceeds a target, or 0 if nothing has weight.

    The bit pattern of a non-negative float, read as an integer, is in the order of the floats. So the answer's bits are
    settled from the top, sixteen in each pass, by counting: two passes for float32, four for float64.

    Args:
        chunks: The data.
        target: From the total weight of every row ``(T,)`` to the target ``(T,)``.
        weight: From entries to their weights; by default each counts 1.
        signed: Whether there are negative values, whose bits are turned over.

    Returns:
        ``(T,)``.
    """
    first = next(iter(chunks()))
    dtype, width = first.dtype, torch.finfo(first.dtype).bits
    lowest = torch.iinfo(INTEGER[dtype]).min
    prefix = torch.zeros(len(first), dtype=torch.int64, device=first.device)  # (T,) the bits that are settled
    left = None  # (T,) what of the target is left for the entries that share the prefix
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        weights = torch.zeros(len(first), 2**_DIGIT, dtype=torch.float64, device=first.device)
        for chunk in chunks():
            for row, settled, bins in zip(chunk.reshape(len(chunk), -1), prefix, weights, strict=True):
                bits = row.contiguous().view(INTEGER[dtype])
                bits = (ordered(bits) ^ lowest if signed else bits) >> shift
                if shift < width - _DIGIT:  # in the first pass nothing is settled and everything counts
                    here = ((bits >> _DIGIT) & (2 ** (width - shift - _DIGIT) - 1)) == settled
                    row, bits = row[here], bits[here]
                bits = bits & (2**_DIGIT - 1)
                bins += torch.bincount(bits, None if weight is None else weight(row.double()), 2**_DIGIT)
        cumulative = weights.cumsum(dim=1)
        total = cumulative[:, -1]
        left = target(total) if left is None else left
        left = torch.minimum(left, total.nextafter(total.new_tensor(-torch.inf)))  # rounding must not leave the row
        digit = torch.searchsorted(cumulative, left.unsqueeze(1), right=True)  # (T, 1)
        smaller = torch.where(digit > 0, cumulative.gather(1, (digit - 1).clamp(min=0)), 0)
        left = left - smaller.squeeze(1)
        prefix = (prefix << _DIGIT) | digit.squeeze(1)
    bits = prefix.to(INTEGER[dtype])
    return (ordered(bits ^ lowest) if signed else bits).view(dtype)
