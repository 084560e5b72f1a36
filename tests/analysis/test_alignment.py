"""The subspace alignment ratio."""

from __future__ import annotations

import json
import math

import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis import (
    RankRule,
    leading_subspace,
    pairwise_alignment,
    projected_ratio,
    subspace_alignment_ratio,
)
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


def test_the_two_rules_for_a_known_spectrum():
    """Of the spectrum 4, 2, 1 with squares 16, 4, 1 the first vector keeps 0.873 of the norm, the first two 0.976."""
    s = torch.tensor([4.0, 2.0, 1.0])
    assert [RankRule(error=error).rank(s) for error in (0.0, 0.2, 0.22, 0.48, 0.49, 1.0)] == [3, 3, 2, 2, 1, 0]
    thresholds = (0.0, 0.87, 0.88, 0.97, 0.98, 1.0)
    assert [RankRule(threshold=threshold).rank(s) for threshold in thresholds] == [1, 1, 2, 2, 3, 3]
    assert [RankRule(threshold=threshold, off_by_one=True).rank(s) for threshold in thresholds] == [0, 0, 1, 1, 2, 0]
    nothing = torch.zeros(3)
    assert RankRule(error=0.05).rank(nothing) == RankRule(threshold=0.97).rank(nothing) == 0
    assert str(RankRule(threshold=0.97, off_by_one=True)) == "as few as keep more than 0.97 of the norm, less one"


def test_known_cases():
    merged, other = torch.zeros(4, 3), torch.zeros(4, 3)
    merged[:2], other[2:] = draw(2, 3).float(), draw(2, 3, seed=1).float()
    assert subspace_alignment_ratio(merged, merged, 0.0) == pytest.approx(1)
    assert subspace_alignment_ratio(other, merged) == 0
    assert subspace_alignment_ratio(merged, torch.zeros(4, 3)) == 0
    assert math.isnan(subspace_alignment_ratio(torch.zeros(4, 3), merged))
    half = torch.diag(torch.tensor([1.0, 1.0]))
    assert subspace_alignment_ratio(half, torch.diag(torch.tensor([3.0, 0.1]))) == pytest.approx(0.5**0.5)


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


def test_pairs_are_projections_of_one_into_the_other():
    """Not symmetric: a matrix that acts in one direction lies in one that acts in all, but not the other way round."""
    narrow, wide = torch.zeros(4, 4), torch.eye(4)
    narrow[0, 0] = 1
    torch.testing.assert_close(pairwise_alignment(torch.stack([narrow, wide])), torch.tensor([[1.0, 1.0], [0.5, 1.0]]))
    deltas = draw(3, 6, 5)
    rule = RankRule(error=0.4)
    found = pairwise_alignment(deltas, rule)
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(found[i, j], subspace_alignment_ratio(deltas[i], deltas[j], rule.error))
    deltas[1] = 0
    found = pairwise_alignment(deltas)
    assert found[1].isnan().all()
    assert (found[[0, 2], 1] == 0).all()


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float64"), ("float16", "bfloat16")])
def test_dtypes_may_differ(dtypes):
    one, other = (getattr(torch, dtype) for dtype in dtypes)
    delta, merged = draw(6, 4).to(one), draw(6, 4, seed=1).to(other)
    expected = subspace_alignment_ratio(delta.double(), merged.double(), 0.5)
    found = subspace_alignment_ratio(delta, merged, 0.5)
    assert found.dtype == (torch.float64 if torch.float64 in (one, other) else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert pairwise_alignment(torch.stack([delta, delta])).min() > 0.97


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": 2}, r"The error of a subspace is a share of the matrix, in \[0, 1\], and 2 is none"),
        ({"threshold": -0.1}, "The threshold of a subspace is a share"),
        ({"error": 0.1, "threshold": 0.9}, "give one of the two"),
        ({"off_by_one": True}, "off_by_one is what the official codes do with a threshold"),
        ({"rank": -1}, "has 3 singular vectors; a rank of -1 is none"),
        ({"rank": 4}, r"A matrix of shape \(4, 3\) has 3 singular vectors; a rank of 4 is none"),
    ],
)
def test_what_cannot_be_meant(arguments, message):
    with pytest.raises(lm.MergeError, match=message):
        leading_subspace(draw(4, 3), **arguments)


def test_matrices_of_other_shapes_are_refused():
    with pytest.raises(lm.MergeError, match=r"shape \(5, 3\) has no part in a subspace of 4 dimensions"):
        subspace_alignment_ratio(draw(5, 3), draw(4, 3))


@pytest.mark.parametrize("threshold", [0.95, 0.97])
def test_the_numbers_of_the_published_code(threshold):
    """Ranks and ratios of the official codes: of the sum of the task matrices, of Iso-C's merge, and of pairs."""
    groups, keys = golden("sar"), json.loads((GOLDEN / "sar.json").read_text())["hparams"]["keys"]
    base, experts = groups["pretrained"], golden_experts(groups)
    found = {
        kind: groups[f"{kind}_thr{100 * threshold:03.0f}"][""] for kind in ("ranks", "sar_ta", "sar_iso", "sar_pair")
    }
    rule = {"threshold": threshold, "off_by_one": True}
    for i, key in enumerate(keys):
        deltas = torch.stack([expert[key] - base[key] for expert in experts])
        merged = deltas.sum(dim=0)
        isotropic = lm.linalg.isotropize(merged)
        ranks = [leading_subspace(own, **rule).shape[1] for own in (merged, isotropic)]
        assert [*ranks, leading_subspace(merged, 0.05).shape[1]] == found["ranks"][i].tolist()
        close(subspace_alignment_ratio(deltas, merged, **rule), found["sar_ta"][i])
        # The singular vectors of a flat spectrum are any; those of the code are the ones of the sum.
        close(subspace_alignment_ratio(deltas, merged, rank=ranks[1]), found["sar_iso"][i])
        close(pairwise_alignment(deltas, RankRule(**rule)).mT, found["sar_pair"][i])
        assert leading_subspace(merged, threshold=threshold).shape[1] == ranks[0] + 1


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_a_subspace_of_a_given_rank():
    delta = draw(6, 4)
    assert leading_subspace(delta, rank=0).shape == (6, 0)
    assert projected_ratio(delta, leading_subspace(delta, rank=0)) == 0
    assert projected_ratio(delta, leading_subspace(delta, rank=4)) == pytest.approx(1)
