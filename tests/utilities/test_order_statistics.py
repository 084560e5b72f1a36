"""Streamed selection against torch.kthvalue on the whole."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.utilities import order_statistics
from lightning_merge.utilities.order_statistics import kth_magnitude, kth_value, sample

DATA = {
    "spread": lambda g: torch.randn(3, 50_000, generator=g) * torch.logspace(-30, 10, 50_000),
    "sorted": lambda g: torch.randn(3, 50_000, generator=g).sort(dim=1).values,
    "few values": lambda g: (torch.randn(3, 50_000, generator=g) * 4).round() / 8,
    "one value": lambda g: torch.full((3, 50_000), -2.0),
    "two values, one rare": lambda g: (torch.rand(3, 50_000, generator=g) < 1e-4).float(),
    "both zeros": lambda g: torch.randn(3, 50_000, generator=g).relu() * torch.randn(3, 50_000, generator=g).sign(),
    "periodic": lambda g: torch.arange(50_000).remainder(243).ne(0) * torch.randn(3, 50_000, generator=g),
    "a tiny half": lambda g: torch.randn(3, 50_000, generator=g) * torch.tensor([1, 1e-12]).repeat_interleave(25_000),
    "infinite and NaN": lambda g: (
        torch.randn(3, 50_000, generator=g).log() / torch.randn(3, 50_000, generator=g).round()
    ),
}
RANKS = [1, 2, 10_000, 24_999, 25_001, 40_000, 49_999, 50_000]


@pytest.fixture
def small_samples(monkeypatch):
    monkeypatch.setattr(order_statistics, "_SAMPLE", 4000)
    monkeypatch.setattr(order_statistics, "_ROOM", 0.3)  # for a bracket as wide as that


def bits(x):
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def in_order(rows):
    """Sorted as the bits of floats are ordered: -NaN first, -0 before 0, NaN last."""
    x = bits(rows)
    top = torch.iinfo(x.dtype).max
    x = torch.where(x < 0, x ^ top, x).sort(dim=1).values
    return torch.where(x < 0, x ^ top, x).view(rows.dtype)


def chunked(rows, passes):
    def chunks():
        passes.append(1)
        return (chunk.reshape(3, -1, 1) for chunk in rows.split([1, 30_000, 0, 19_999], dim=1))

    return chunks


@pytest.mark.parametrize("room", [0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DATA)
def test_whatever_the_data_the_bits_are_right(name, dtype, room, small_samples, monkeypatch):
    monkeypatch.setattr(order_statistics, "_ROOM", room)
    rows = DATA[name](torch.Generator().manual_seed(0)).to(dtype)
    chunks = chunked(rows, [])
    magnitudes, values = in_order(rows.abs()), in_order(rows)
    found = kth_magnitude(chunks, RANKS), kth_value(chunks, RANKS)
    for k, magnitude, value in zip(RANKS, *found, strict=True):
        assert torch.equal(bits(magnitude), bits(magnitudes[:, k - 1].contiguous())), k
        assert torch.equal(bits(value), bits(values[:, k - 1].contiguous())), k


@pytest.mark.parametrize("name", ["spread", "sorted", "one value"])
def test_two_passes_do_and_one_if_a_sample_is_given(name, small_samples):
    rows, passes = DATA[name](torch.Generator().manual_seed(0)), []
    chunks = chunked(rows, passes)
    kth_magnitude(chunks, [20_000, 40_000])
    assert len(passes) == 2
    drawn = sample(chunks)
    passes.clear()
    kth_value(chunks, 40_000, drawn)
    assert len(passes) == 1


def test_a_sample_that_misleads_does_not_change_the_answer(small_samples):
    rows = DATA["sorted"](torch.Generator().manual_seed(0))
    drawn = sample(lambda: [rows])
    for misleading in (drawn.values * 3, drawn.values * 0, drawn.values + 9):
        found = kth_value(lambda: [rows], 40_000, drawn._replace(values=misleading))
        assert torch.equal(found, rows[:, 39_999])


def test_a_sample_is_spread_evenly_over_chunks(small_samples):
    rows = torch.arange(50_000.0).repeat(2, 1)
    drawn = sample(lambda: rows.split([7, 10_000, 29_993, 10_000], dim=1))
    assert drawn.total == 50_000
    assert drawn.values.tolist() == rows[:, ::27].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_against_kthvalue(dtype, k):
    data = torch.randn(3, 1000, dtype=dtype) * torch.logspace(-30, 10, 1000, dtype=dtype)
    data[:, ::7] = 0  # ties and zeros
    data[:, 1::7] = 0.25
    chunks = data.split([1, 500, 0, 499], dim=1)
    found = kth_magnitude(lambda: (chunk.reshape(3, -1, 1) for chunk in chunks), k)
    assert torch.equal(found, data.abs().kthvalue(k, dim=1).values)


def test_scalars_count_too():
    assert kth_magnitude(lambda: [torch.tensor([-3.0]), torch.tensor([[1.0, 2.0]])], 2).tolist() == [2.0]
