"""The k-th smallest magnitude of a whole model, exactly, without ever holding the model in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_DIGIT = 16
"""Bits that are settled in one pass over the data."""


def kth_magnitude(chunks: Callable[[], Iterable[Tensor]], k: int) -> Tensor:
    """Find the k-th smallest ``|x|`` per row over data that arrive in chunks, by radix selection.

    The bit pattern of a non-negative float, read as an integer, is in the order of the floats. So the answer's bits are
    settled from the top, sixteen in each pass, by counting: two passes for float32, four for float64.

    Args:
        chunks: Called once per pass; yields tensors ``(T, …)``, all float32 or all float64.
        k: From 1 to the number of entries of a row.

    Returns:
        ``(T,)``: the k-th smallest magnitude in each row.
    """
    first = next(iter(chunks()))
    integer, width = _INTEGER[first.dtype], torch.finfo(first.dtype).bits
    prefix = torch.zeros(len(first), dtype=torch.int64, device=first.device)  # (T,) the bits that are settled
    rank = torch.full_like(prefix, k)  # (T,) the answer's rank among the entries that share the prefix
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(len(first), 2**_DIGIT, dtype=torch.int64, device=first.device)
        for chunk in chunks():
            for row, settled, count in zip(
                chunk.abs().reshape(len(chunk), -1).view(integer), prefix, counts, strict=True
            ):
                bits = row.to(torch.int64) >> shift
                if shift < width - _DIGIT:  # in the first pass nothing is settled and everything counts
                    bits = bits[(bits >> _DIGIT) == settled]
                count += torch.bincount(bits & (2**_DIGIT - 1), minlength=2**_DIGIT)
        cumulative = counts.cumsum(dim=1)
        digit = torch.searchsorted(cumulative, rank.unsqueeze(1))  # (T, 1)
        smaller = torch.where(digit > 0, cumulative.gather(1, (digit - 1).clamp(min=0)), 0)
        rank = rank - smaller.squeeze(1)
        prefix = (prefix << _DIGIT) | digit.squeeze(1)
    return prefix.to(integer).view(first.dtype)


_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
