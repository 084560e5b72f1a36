"""Numbers of any size: what is too large or too small for squares and sums, against float64 and exact arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_merge.utilities.tensors import (
    homogeneous,
    largest_magnitude,
    mean,
    norm,
    times_power,
    unit_exponent,
    without_masks,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_largest_magnitude(dtype):
    assert largest_magnitude(torch.tensor([1.0, -4.0, 2.0]).to(dtype)) == 4.0
    assert largest_magnitude(torch.empty(0, dtype=dtype)) == 0.0
    assert math.isnan(largest_magnitude(torch.tensor([1.0, float("nan")]).to(dtype)))


@pytest.mark.parametrize("largest", [1.0, 1e-12, 1e12, 0.0, math.inf, math.nan])
def test_ordinary_numbers_are_left_alone(largest):
    assert unit_exponent(largest) == 0
    tensor = torch.ones(2)
    assert times_power(tensor, 0) is tensor


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 3e38), (torch.float32, 1e-45), (torch.float64, 5e-324)])
def test_a_power_of_two_is_exact_and_leads_back(dtype, value):
    tensor = torch.tensor([value, -value, 0.0], dtype=dtype)
    exponent = unit_exponent(value)
    scaled = times_power(tensor, exponent)
    assert 0.5 <= float(scaled[0]) <= 1
    assert torch.equal(times_power(scaled, -exponent), tensor)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 3e38), (torch.float64, 1.7e308)])
def test_the_mean_of_large_numbers(dtype, largest):
    stack = torch.tensor([[largest, 1.0], [largest, 2.0], [largest / 2, 6.0]], dtype=dtype)
    torch.testing.assert_close(mean(stack) / largest, torch.tensor([5 / 6, 3 / largest], dtype=dtype))
    assert torch.equal(mean(stack[:, 1:]), stack[:, 1:].mean(dim=0))


def test_norms_of_large_numbers():
    vectors = torch.tensor([[3e200, 4e200], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(norm(vectors, dim=1), torch.tensor([5e200, 5.0, 0.0], dtype=torch.float64))
    assert norm(vectors, dim=1, keepdim=True).shape == (3, 1)
    matrices = torch.full((2, 3, 3), 1e30)
    torch.testing.assert_close(norm(matrices, dim=(-2, -1)), torch.full((2,), 3e30))


def test_a_rule_that_commutes_with_scaling_sees_numbers_of_about_one():
    @homogeneous
    def root_mean_square(tensor, factor):
        assert 0.5 <= float(tensor.abs().max()) <= 1
        return factor * tensor.square().mean(dim=0).sqrt()

    for size in (1e30, 1e-30, 1e-40):
        found = root_mean_square(torch.full((3, 2), size), 2.0)
        torch.testing.assert_close(found.double(), torch.full((2,), 2 * size, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_mask_is_what_both_share():
    inf = torch.inf
    a, b = without_masks(torch.tensor([inf, -inf, inf, 1.0]), torch.tensor([inf, -inf, -inf, 2.0]))
    assert a.tolist() == [0.0, 0.0, inf, 1.0]
    assert b.tolist() == [0.0, 0.0, -inf, 2.0]
