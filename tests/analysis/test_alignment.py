"""The subspace alignment ratio."""

from __future__ import annotations

import json
import math

import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis import leading_subspace, projected_ratio, subspace_alignment_ratio
from tests.toys import GOLDEN, golden, golden_experts


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(delta, merged, error):
    """The paper's formula, with projections instead of coordinates and a loop instead of sums."""
    U, _, _ = torch.linalg.svd(merged, full_matrices=False)
    for k in range(U.shape[1] + 1):
        P = U[:, :k] @ U[:, :k].mT
        if torch.linalg.norm(merged - P @ merged) <= error * torch.linalg.norm(merged):
            return torch.linalg.norm(P @ delta) / torch.linalg.norm(delta), k
    raise AssertionError


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (1, 4)])
@pytest.mark.parametrize("error", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_papers_formula(shape, error, dtype):
    delta, merged = draw(*shape), draw(*shape, seed=1) @ torch.diag(0.5 ** torch.arange(shape[1]).double())
    expected, k = by_definition(delta, merged, error)
    found = subspace_alignment_ratio(delta.to(dtype), merged.to(dtype), error)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    assert leading_subspace(merged, error).shape == (shape[0], k)


def test_known_cases():
    merged, other = torch.zeros(4, 3), torch.zeros(4, 3)
    merged[:2], other[2:] = draw(2, 3).float(), draw(2, 3, seed=1).float()
    assert subspace_alignment_ratio(merged, merged, 0.0) == pytest.approx(1)
    assert subspace_alignment_ratio(other, merged) == 0
    assert subspace_alignment_ratio(merged, torch.zeros(4, 3)) == 0
    assert math.isnan(subspace_alignment_ratio(torch.zeros(4, 3), merged))
    half = torch.diag(torch.tensor([1.0, 1.0]))
    assert subspace_alignment_ratio(half, torch.diag(torch.tensor([3.0, 0.1]))) == pytest.approx(0.5**0.5)
    with pytest.raises(lm.MergeError, match="in \\[0, 1\\], and 2 is none"):
        leading_subspace(merged, 2)


def test_does_not_change_with_rotations_and_scales():
    delta, merged = draw(7, 5), draw(7, 5, seed=1)
    Q, R = (torch.linalg.qr(draw(n, n, seed=n)).Q for n in (7, 5))
    expected = subspace_alignment_ratio(delta, merged, 0.4)
    assert 0.1 < expected < 0.99
    for one, other in ((Q @ delta @ R, Q @ merged @ R), (3 * delta, -0.1 * merged), (delta @ R, merged)):
        torch.testing.assert_close(subspace_alignment_ratio(one, other, 0.4), expected)


def test_several_at_once():
    deltas, merged = draw(2, 3, 6, 4), draw(6, 4, seed=1)
    ratios = subspace_alignment_ratio(deltas, merged, 0.5)
    assert ratios.shape == (2, 3)
    torch.testing.assert_close(ratios[1, 2], subspace_alignment_ratio(deltas[1, 2], merged, 0.5))


def test_the_numbers_of_the_published_code():
    """Whose rule for the rank is another one (see spec in the file's notes), so that its ranks are given here."""
    groups, keys = golden("sar"), json.loads((GOLDEN / "sar.json").read_text())["hparams"]["keys"]
    base, experts = groups["pretrained"], golden_experts(groups)
    for i, key in enumerate(keys):
        deltas = torch.stack([expert[key] - base[key] for expert in experts])
        merged = deltas.sum(dim=0)
        for threshold in ("thr095", "thr097"):
            k_sum, _, k_error = groups[f"ranks_{threshold}"][""][i].tolist()
            assert leading_subspace(merged, 0.05).shape[1] == k_error
            found = subspace_alignment_ratio(deltas, merged, rank=k_sum)
            torch.testing.assert_close(found, groups[f"sar_ta_{threshold}"][""][i], rtol=0, atol=2e-6)
        pairs = groups["sar_pair_thr095"][""][i]
        torch.testing.assert_close(projected_ratio(deltas[1], _subspace(deltas[0])), pairs[0, 1], rtol=0, atol=2e-6)


def _subspace(delta):
    s = torch.linalg.svdvals(delta.double())
    retained = (s.square().cumsum(0) / s.square().sum()).sqrt()
    return leading_subspace(delta, rank=int((retained > 0.95).double().argmax()))
