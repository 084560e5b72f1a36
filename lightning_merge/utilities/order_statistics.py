"""Order statistics of a whole model (and its moments), exactly, without ever holding the model in one piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_merge.utilities.radix_selection import INTEGER, Chunks, ordered, select
from lightning_merge.utilities.tiling import indicator, pieces

_SAMPLE = 450_000
"""Entries of a row that a sample holds at most; rows up to that length are sampled whole."""

_MARGIN = 5.0
"""Standard deviations of a rank in a sample of independent entries, left on both sides of it."""

_ROOM = 1 / 32
"""Share of the data that a pass may put aside; what does not fit is left to radix selection."""


class Sample(NamedTuple):
    """Entries that are spread evenly over the data.

    Args:
        values: ``(T, s)``.
        total: Entries of a row of the data.
    """

    values: Tensor
    total: int


def sample(chunks: Chunks) -> Sample:
    """Draw a sample in one pass: every entry, or every 3rd, 9th, … of a row (odd, not to meet the same columns)."""
    drawn: Tensor | None = None  # one block: small pieces between the chunks' would keep the heap from shrinking
    count, stride, seen = 0, 1, 0
    for chunk in chunks():
        rows = chunk.reshape(len(chunk), chunk[0].numel())
        if drawn is None:
            drawn = rows.new_empty(len(rows), _SAMPLE)
        while -(-(seen + rows.shape[1]) // stride) > _SAMPLE:
            kept = drawn[:, :count:3].clone()
            count = kept.shape[1]
            drawn[:, :count] = kept
            stride *= 3
        new = rows[:, -seen % stride :: stride]
        drawn[:, count : count + new.shape[1]] = new
        count += new.shape[1]
        seen += rows.shape[1]
    assert drawn is not None  # there are data
    return Sample(drawn[:, :count], seen)


def kth_magnitude(chunks: Chunks, k: int | Sequence[int], drawn: Sample | None = None) -> Tensor:
    """Find the k-th smallest ``|x|`` per row over data that arrive in chunks.

    A sample brackets the value narrowly; one pass over the data counts what lies below the bracket and puts aside what
    lies within. Where the sample misleads or too many entries are equal, radix selection takes over.

    Args:
        chunks: The data.
        k: From 1 to the number of entries of a row; or several ranks.
        drawn: A sample of the data, for which otherwise one more pass is made.

    Returns:
        ``(T,)``: the k-th smallest magnitude in each row, a NaN being the largest; or ``(K, T)`` for K ranks.
    """
    drawn = drawn or sample(chunks)
    return _kth(chunks, k, drawn._replace(values=drawn.values.abs()), signed=False)


def kth_value(chunks: Chunks, k: int | Sequence[int], drawn: Sample | None = None) -> Tensor:
    """Find the k-th smallest value per row, of either sign: ``(T,)`` or ``(K, T)``, see :func:`kth_magnitude`."""
    return _kth(chunks, k, drawn or sample(chunks), signed=True)


def norm_fraction_magnitude(chunks: Chunks, fraction: float) -> Tensor:
    """Find the magnitude from which on the largest entries hold a share of each row's squared norm.

    Args:
        chunks: The data.
        fraction: The share, in (0, 1].

    Returns:
        ``(T,)``: the largest threshold such that the entries with ``|x| >= threshold`` hold at least that share.
    """
    return select(_magnitudes(chunks), lambda total: (1 - fraction) * total, weight=torch.square)


def moments(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Compute the mean and the (unbiased) standard deviation of every row, in float64: ``(T,), (T,)``."""

    def rows() -> Iterable[Tensor]:
        return (chunk.double().reshape(len(chunk), -1) for chunk in chunks())

    count = sum(chunk.shape[1] for chunk in rows())
    mean = reduce(torch.add, (chunk.sum(dim=1) for chunk in rows())) / count
    squares = reduce(torch.add, ((chunk - mean.unsqueeze(1)).square().sum(dim=1) for chunk in rows()))
    return mean, (squares / max(count - 1, 1)).sqrt()


def _magnitudes(chunks: Chunks) -> Chunks:
    return lambda: (chunk.abs() for chunk in chunks())


def _kth(chunks: Chunks, k: int | Sequence[int], drawn: Sample, signed: bool) -> Tensor:
    ranks = [k] if isinstance(k, int) else list(k)
    values = _by_sample(chunks, ranks, drawn, signed)
    if values is None:
        data = chunks if signed else _magnitudes(chunks)
        targets = [partial(torch.full_like, fill_value=k - 0.5) for k in ranks]
        values = torch.stack([select(data, target, signed=signed) for target in targets])
    return values[0] if isinstance(k, int) else values


def _by_sample(chunks: Chunks, ranks: list[int], drawn: Sample, signed: bool) -> Tensor | None:
    """Find the values of the ranks, ``(K, T)``; None where they cannot be told from a sample."""
    if drawn.values.shape[1] == drawn.total:
        return torch.stack([torch.stack([_kth_of(row, k) for row in drawn.values]) for k in ranks])
    low, high = _brackets(drawn, ranks)
    answer, pending = low.clone(), list(product(range(len(ranks)), range(low.shape[1])))
    for _ in range(2):  # the second time to count the entries that equal an end of the bracket, if many do
        tally = _tally(chunks, low, high, signed, _ROOM * drawn.total * low.numel())
        if tally is None:
            return None
        unsettled = []
        for q, t in pending:
            k, up_to_low, below_high = ranks[q], int(tally.up_to_low[q, t]), int(tally.below_high[q, t])
            if up_to_low < k <= below_high:
                answer[q, t] = _kth_of(tally.inside(q, t), k - up_to_low)
            elif below_high < k <= up_to_low and not (signed and low[q, t] == 0):  # there are two zeros
                answer[q, t] = low[q, t]
            else:
                unsettled.append((q, t))
                low[q, t] = high[q, t] = low[q, t] if k <= up_to_low else high[q, t]
        pending = unsettled
        if not pending:
            return answer
    return None


def _kth_of(values: Tensor, k: int) -> Tensor:
    """Find the k-th smallest of ``(n,)`` in the order of the bits, in which -0 comes before 0."""
    bits = ordered(values.contiguous().view(INTEGER[values.dtype]))
    return ordered(bits.kthvalue(k).values).view(values.dtype)


def _brackets(drawn: Sample, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """Find values that lie almost certainly on either side of those of the ranks: ``(K, T), (K, T)``."""
    size = drawn.values.shape[1]
    ends = drawn.values.new_empty(2, len(ranks), len(drawn.values))
    for q, k in enumerate(ranks):
        share = k / drawn.total
        margin = _MARGIN * (size * share * (1 - share)) ** 0.5 + 2 * _MARGIN
        first, last = int(share * size - margin), int(share * size + margin) + 1
        ends[0, q] = drawn.values.kthvalue(first, dim=1).values if first >= 1 else -torch.inf
        ends[1, q] = drawn.values.kthvalue(last, dim=1).values if last <= size else torch.inf
    return ends[0], ends[1]


class _Tally(NamedTuple):
    """The counts ``(K, T)`` of a pass over the data for K brackets a row, and the entries between their ends."""

    up_to_low: Tensor
    below_high: Tensor
    memory: Tensor
    """All that was put aside, one piece after another: in one block, of which only what is used takes memory."""
    parts: list[list[tuple[int, list[int]]]]
    """For every rank where the entries of each piece begin, and how many are of which row."""

    def inside(self, q: int, t: int) -> Tensor:
        starts = [(begin + sum(counts[:t]), counts[t]) for begin, counts in self.parts[q]]
        return torch.cat([self.memory[start : start + count] for start, count in starts])


def _tally(chunks: Chunks, low: Tensor, high: Tensor, signed: bool, room: float) -> _Tally | None:
    """Tally a pass over the data; None if more than ``room`` entries lie inside, or (of either sign) NaNs are met."""
    zeros = torch.zeros_like(low, dtype=torch.int64)
    tally = _Tally(zeros, zeros.clone(), low.new_empty(int(room)), [[] for _ in low])
    used = 0
    for chunk in chunks():
        for piece in pieces(chunk):
            values = piece.contiguous() if signed else piece.abs()
            if signed and values.sum().isnan():
                return None
            for q, ends in enumerate(zip(low.unsqueeze(2), high.unsqueeze(2), strict=True)):
                up_to_low, below_high = indicator(torch.le, values, ends[0]), indicator(torch.lt, values, ends[1])
                counts = [marks.sum(dim=1).long() for marks in (up_to_low, below_high)]
                tally.up_to_low[q] += counts[0]
                tally.below_high[q] += counts[1]
                inside = _where(indicator(torch.gt, below_high, up_to_low).bool(), values)
                if used + inside.numel() > room:
                    return None
                tally.memory[used : used + inside.numel()] = inside
                tally.parts[q].append((used, (counts[1] - counts[0]).clamp(min=0).tolist()))
                used += inside.numel()
    return tally


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """Select ``values[mask]``, looking at eight flags at once, which is faster where few are true."""
    mask, values = mask.view(-1), values.view(-1)
    if len(mask) % 8 == 0:
        words = mask.view(torch.int64).nonzero().squeeze(1)
        mask, values = mask.view(-1, 8)[words], values.view(-1, 8)[words]
    return values[mask]
