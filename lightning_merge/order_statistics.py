"""Order statistics of a whole model (and its moments), exactly, without ever holding the model in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Chunks = Callable[[], Iterable[Tensor]]
"""Called once per pass over the data; yields tensors ``(T, …)``, all float32 or all float64."""

_DIGIT = 16
"""Bits that are settled in one pass over the data."""


def kth_magnitude(chunks: Chunks, k: int) -> Tensor:
    """Find the k-th smallest ``|x|`` per row over data that arrive in chunks, by radix selection.

    Args:
        chunks: The data.
        k: From 1 to the number of entries of a row.

    Returns:
        ``(T,)``: the k-th smallest magnitude in each row.
    """
    return _select(_magnitudes(chunks), lambda total: torch.full_like(total, k - 0.5))


def kth_value(chunks: Chunks, k: int) -> Tensor:
    """Find the k-th smallest value per row, of either sign, see :func:`kth_magnitude`."""
    return _select(chunks, lambda total: torch.full_like(total, k - 0.5), signed=True)


def norm_fraction_magnitude(chunks: Chunks, fraction: float) -> Tensor:
    """Find the magnitude from which on the largest entries hold a share of each row's squared norm.

    Args:
        chunks: The data.
        fraction: The share, in (0, 1].

    Returns:
        ``(T,)``: the largest threshold such that the entries with ``|x| >= threshold`` hold at least that share.
    """
    return _select(_magnitudes(chunks), lambda total: (1 - fraction) * total, weight=torch.square)


def moments(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Compute the mean and the (unbiased) standard deviation of every row, in float64: ``(T,), (T,)``."""

    def rows() -> Iterable[Tensor]:
        return (chunk.double().reshape(len(chunk), -1) for chunk in chunks())

    count = sum(chunk.shape[1] for chunk in rows())
    mean = sum(chunk.sum(dim=1) for chunk in rows()) / count
    squares = sum((chunk - mean.unsqueeze(1)).square().sum(dim=1) for chunk in rows())
    return mean, (squares / max(count - 1, 1)).sqrt()


def _magnitudes(chunks: Chunks) -> Chunks:
    return lambda: (chunk.abs() for chunk in chunks())


def _select(
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
    prefix = torch.zeros(len(first), dtype=torch.int64, device=first.device)  # (T,) the bits that are settled
    left = None  # (T,) what of the target is left for the entries that share the prefix
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        weights = torch.zeros(len(first), 2**_DIGIT, dtype=torch.float64, device=first.device)
        for chunk in chunks():
            for row, settled, bins in zip(chunk.reshape(len(chunk), -1), prefix, weights, strict=True):
                bits = row.contiguous().view(_INTEGER[dtype])
                bits = (_turn(bits) if signed else bits) >> shift
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
    bits = prefix.to(_INTEGER[dtype])
    return (_turn_back(bits) if signed else bits).view(dtype)


_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def _turn(bits: Tensor) -> Tensor:
    """Order the bit patterns of floats of either sign, as unsigned integers."""
    info = torch.iinfo(bits.dtype)
    return torch.where(bits < 0, ~bits, bits ^ info.min)


def _turn_back(bits: Tensor) -> Tensor:
    """The inverse of :func:`_turn`."""
    info = torch.iinfo(bits.dtype)
    return torch.where(bits < 0, bits ^ info.min, ~bits)
