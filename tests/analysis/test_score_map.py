"""SCORE's map of a layer."""

from __future__ import annotations

import json

import pytest
import torch

import lightning_merge as lm
from lightning_merge.analysis import score_map
from lightning_merge.analysis.score_map import pool
from lightning_merge.methods import SCORE
from lightning_merge.methods.score import score
from tests.toys import golden


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 9, 6), (2, 5, 8), (4, 8, 8), (3, 7, 11)])
def test_its_energies_by_hand(shape):
    deltas = draw(*shape)
    found = score_map(deltas)
    q = min(shape[1:]) // len(deltas)
    factors = [with_positive_peaks(*torch.linalg.svd(delta, full_matrices=False)) for delta in deltas]
    bases = []
    for side in (torch.cat([U[:, :q] for U, _, _ in factors], 1), torch.cat([Vt[:q].T for _, _, Vt in factors], 1)):
        P, _, Qt = torch.linalg.svd(side, full_matrices=False)
        bases.append(P @ Qt)
    P = [bases[0].T @ delta @ bases[1] for delta in deltas]
    off = [own - torch.diag(own.diagonal()) for own in P]
    kept = [own * ((own - own.mean()).abs() <= 1.96 / len(deltas) * own.std()) for own in off]
    energies = {"whole": deltas, "projected": P, "off": off, "kept": kept}
    whole, projected, off_energy, kept_energy = (sum(float(x.square().sum()) for x in of) for of in energies.values())
    assert found.kept == pytest.approx(kept_energy / off_energy)
    assert found.pruned == pytest.approx(1 - found.kept)
    assert found.off_diagonal == pytest.approx(off_energy / projected)
    assert found.projected == pytest.approx(projected / whole)
    diagonal = sum(own.diagonal() for own in P)
    assert found.agreement == pytest.approx(float(diagonal.square().sum()) / whole)
    assert found.conflict == pytest.approx(float(sum(kept).square().sum()) / whole)
    torch.testing.assert_close(found.resolved, sum(kept) + torch.diag(diagonal))


def with_positive_peaks(U, s, Vt):
    """Flip singular vectors in pairs, so that the largest entry of each left one is positive."""
    signs = torch.stack([column[column.abs().argmax()].sign() for column in U.T])
    return U * signs, s, Vt * signs[:, None]


@pytest.mark.parametrize("method", [SCORE(), SCORE(z=1, divide_by_num_tasks=False, threshold="paper")])
def test_is_what_the_method_puts_between_its_bases(method):
    deltas = draw(3, 9, 6)
    found = score_map(deltas, method)
    merged = score(deltas, method.mode, method.z, method.divide_by_num_tasks, method.threshold)
    torch.testing.assert_close(
        torch.linalg.svdvals(found.resolved), torch.linalg.svdvals(merged)[: len(found.resolved)]
    )


def test_is_the_map_of_the_published_code():
    """On the diagonal, where T divides the rank: what is kept off it depends on the signs of singular vectors."""
    groups = golden("score")
    checked = 0
    for key, sigma in groups["sigma64_natural"].items():
        deltas = torch.stack([groups[f"expert{i}"][key] - groups["pretrained"][key] for i in range(4)])
        if len(sigma) % 4 or not deltas.any():
            continue
        found, whole = score_map(deltas), float(deltas.double().square().sum())
        torch.testing.assert_close(found.resolved.diagonal().double(), sigma.diagonal(), rtol=1e-3, atol=1e-6)
        assert found.agreement == pytest.approx(float(sigma.diagonal().square().sum()) / whole, rel=1e-4)
        checked += 1
    assert checked > 3


def test_experts_apart_opposite_and_alike():
    apart, delta = torch.zeros(2, 4, 4), torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))
    apart[0, :2, :2], apart[1, 2:, 2:] = torch.diag(torch.tensor([3.0, 2.0])), torch.diag(torch.tensor([2.5, 1.0]))
    found = score_map(apart)
    assert (found.projected, found.agreement, found.conflict, found.off_diagonal) == pytest.approx(
        (1, 1, 0, 0), abs=1e-6
    )
    found = score_map(torch.stack([delta, -delta]))
    assert (found.agreement, found.conflict) == pytest.approx((0, 0), abs=1e-6)
    found = score_map(torch.stack([delta, delta]))  # half of each lies where one basis vector leads to the other's
    assert (found.agreement, found.off_diagonal) == pytest.approx((1, 0.5), abs=1e-6)


def test_half_precision_zeros_and_too_few():
    deltas = draw(2, 6, 4).bfloat16()
    assert score_map(deltas).kept == pytest.approx(score_map(deltas.double()).kept, abs=0.05)
    nothing = score_map(torch.zeros(2, 4, 4))
    assert all(value != value for value in (nothing.kept, nothing.off_diagonal, nothing.agreement))
    for shape in ((1, 4, 4), (5, 4, 9)):
        with pytest.raises(lm.MergeError, match="at least two experts, and a direction for each"):
            score_map(torch.zeros(shape))


def test_pooling_keeps_the_largest_entry_of_each_cell():
    matrix = draw(10, 7)
    assert pool(matrix, 10) is matrix
    small = pool(matrix, 5)
    assert small.shape == (5, 5)
    assert small[0, 0] == matrix[:2, :2].flatten()[matrix[:2, :2].abs().argmax()]
    assert set(small.flatten().tolist()) <= set(matrix.flatten().tolist())
    assert small.abs().max() == matrix.abs().max()
    assert json.dumps(small.tolist())
