"""Streamed selection against torch.kthvalue on the whole."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.order_statistics import kth_magnitude


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
