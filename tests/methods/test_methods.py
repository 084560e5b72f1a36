"""What the methods promise beyond their authors' numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import lightning_merge as lm
from lightning_merge.methods import SCORE, TIES, TSVM, Context, IsoC, IsoCTS, MagMax, TaskArithmetic, WeightAverage
from lightning_merge.methods.iso_cts import split_rank
from lightning_merge.methods.score import trim
from lightning_merge.methods.ties import Survey
from tests.toys import base_weights, expert_weights

ALL = [
    WeightAverage(),
    TaskArithmetic(),
    TIES(),
    MagMax(),
    TSVM(),
    IsoC(),
    IsoCTS(),
    SCORE(),
    SCORE("diagonal"),
    SCORE("off_diagonal"),
    SCORE("full"),
    SCORE(threshold="paper"),
]


@pytest.mark.parametrize("method", ALL, ids=repr)
class TestEveryMethod:
    def test_order_of_experts_does_not_matter(self, method):
        base = base_weights()
        experts = [expert_weights(base, i) for i in range(3)]
        one = lm.merge(base, experts, method).weights
        other = lm.merge(base, experts[::-1], method).weights
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)

    def test_experts_equal_to_the_base_change_nothing(self, method):
        base = base_weights()
        merged = lm.merge(base, [base, base], method).weights
        assert all(torch.equal(merged[name], base[name]) for name in base)

    def test_inputs_stay_as_they_are(self, method):
        base = base_weights()
        experts = [expert_weights(base, i) for i in range(3)]
        before = [{k: v.clone() for k, v in model.items()} for model in (base, *experts)]
        lm.merge(base, experts, method)
        for model, copy in zip((base, *experts), before, strict=True):
            assert all(torch.equal(model[name], copy[name]) for name in copy)

    def test_result_is_finite_where_vectors_are_degenerate(self, method):
        base = base_weights()
        twin = expert_weights(base, 1)
        experts = [twin, twin, base, *(expert_weights(base, i) for i in range(20))]  # duplicates, zeros, T > rank
        merged = lm.merge(base, experts, method).weights
        assert all(bool(tensor.isfinite().all()) for tensor in merged.values() if tensor.is_floating_point())

    def test_same_bytes_twice_and_for_any_number_of_workers(self, method):
        base = base_weights()
        experts = [expert_weights(base, i) for i in range(3)]
        one = lm.merge(base, experts, method).weights
        two = lm.merge(base, experts, method, workers=3).weights
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_scale_scales_the_update(self, method):
        base = {k: v.double() for k, v in base_weights().items() if v.is_floating_point()}
        experts = [expert_weights(base, i) for i in range(3)]
        one = lm.merge(base, experts, method, scale=1.0).weights
        half = lm.merge(base, experts, method, scale=0.5).weights
        for name in base:
            if "running" not in name:
                torch.testing.assert_close(half[name] - base[name], (one[name] - base[name]) / 2, rtol=1e-5, atol=1e-7)

    def test_arguments_are_frozen_and_described(self, method):
        description = method.describe()
        assert type(method)(**description["init_args"]) == method
        with pytest.raises(dataclasses.FrozenInstanceError):
            method.scale = 2


@pytest.mark.parametrize(
    ("make", "range_"),
    [
        (lambda: TIES(density=0), r"\(0, 1\]"),
        (lambda: TIES(density=1.5), r"\(0, 1\]"),
        (lambda: TIES(merge="median"), "mean, sum, max"),
        (lambda: IsoCTS(common_fraction=-0.1), r"\[0, 1\]"),
        (lambda: SCORE(z=-1), r"\[0, inf\]"),
        (lambda: SCORE(mode="trim"), "trimmed, diagonal"),
        (lambda: SCORE(threshold="mine"), "code, paper"),
        (lambda: IsoCTS(common_fraction=float("nan")), r"\[0, 1\]"),
    ],
)
def test_bad_hyper_parameters_name_what_is_allowed(make, range_):
    with pytest.raises(ValueError, match=range_):
        make()


def test_ties_by_hand():
    deltas = torch.tensor([[3.0, -1.0, 0.1, 2.0], [-1.0, -3.0, 0.2, -2.0]])
    survey = Survey(torch.tensor([1.0, 1.0]), majority=torch.tensor(-1.0))
    found = TIES().tensor(deltas, Context(survey=survey))
    # kept: all but the third; signs +, -, 0 (nothing kept), 0 -> the model's, -
    torch.testing.assert_close(found, torch.tensor([3.0, -2.0, 0.0, -2.0]))


def test_ties_threshold_is_that_of_the_whole_model():
    base = {"a": torch.zeros(50), "b": torch.zeros(50)}
    expert = {"a": torch.arange(50.0) + 100, "b": torch.arange(50.0)}
    merged = lm.merge(base, [expert], TIES(density=0.5)).weights
    assert torch.equal(merged["a"], expert["a"])
    assert int((merged["b"] != 0).sum()) == 1  # int(0.5 * 100) + 1 entries are kept, as in the official code


def test_magmax_gives_ties_to_the_last_expert():
    found = MagMax().tensor(torch.tensor([[1.0, -2.0], [-1.0, 1.0]]), Context())
    assert found.tolist() == [-1.0, -2.0]


def test_iso_c_has_a_flat_spectrum_with_the_sum_s_mean_singular_value():
    deltas = torch.randn(3, 9, 6, dtype=torch.float64)
    s = np.linalg.svd(IsoC().matrix(deltas, Context()).numpy(), compute_uv=False)
    expected = np.linalg.svd(deltas.sum(dim=0).numpy(), compute_uv=False).mean()
    np.testing.assert_allclose(s, expected, rtol=1e-9)


def test_iso_c_leaves_the_null_space_of_the_sum_alone():
    direction = torch.randn(6, 1, dtype=torch.float64)
    low_rank = torch.randn(2, 9, 1, dtype=torch.float64) @ direction.T  # rank one over all experts
    found = IsoC().matrix(low_rank, Context())
    assert int(torch.linalg.matrix_rank(found)) <= 2
    away = torch.eye(6, dtype=torch.float64) - direction @ direction.T / (direction.T @ direction)
    torch.testing.assert_close(found @ away, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_iso_cts_rounds_halves_to_even():
    assert split_rank(8, 4, 0.8) == (8, 0)  # round(0.5) = 0: Iso-C
    assert split_rank(12, 4, 0.8) == (8, 1)
    assert split_rank(20, 4, 0.5) == (12, 2)  # round(2.5) = 2


def test_score_full_is_task_arithmetic_where_the_basis_is_complete():
    square = torch.randn(4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(SCORE("full").matrix(square, Context()), square.sum(dim=0), rtol=1e-9, atol=1e-9)


def test_score_without_a_threshold_keeps_everything():
    deltas = torch.randn(4, 12, 8, dtype=torch.float64)
    everything = SCORE(z=float("inf")).matrix(deltas, Context())
    torch.testing.assert_close(everything, SCORE("full").matrix(deltas, Context()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threshold", ["code", "paper"])
def test_score_statistics_against_numpy(threshold):
    off = torch.randn(2, 5, 5, dtype=torch.float64)
    off.diagonal(dim1=-2, dim2=-1).zero_()
    found = trim(off, 1.1, threshold)
    for i, own in enumerate(off.numpy()):
        values = own.ravel() if threshold == "code" else own[~np.eye(5, dtype=bool)]
        keep = np.abs(own - values.mean()) <= 1.1 * values.std(ddof=1)
        np.testing.assert_array_equal(found[i].numpy() != 0, keep & (own != 0))
        assert 0 < keep.sum() < 25


def test_tsv_m_of_one_expert_is_the_expert():
    delta = torch.randn(1, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(TSVM().matrix(delta, Context()), delta[0], rtol=1e-9, atol=1e-9)


def test_task_matrices_of_lower_rank_than_experts_are_averaged():
    deltas = torch.randn(5, 3, 9, dtype=torch.float64)
    for method in (TSVM(), SCORE()):
        torch.testing.assert_close(method.matrix(deltas, Context()), deltas.mean(dim=0))
