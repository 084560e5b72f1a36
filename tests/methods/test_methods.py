"""What the methods promise beyond their authors' numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import lightning_merge as lm
from lightning_merge.methods import (
    SCORE,
    TIES,
    TSVM,
    Context,
    IsoC,
    IsoCTS,
    MagMax,
    TALLMask,
    TaskArithmetic,
    WeightAverage,
    Wrapper,
)
from lightning_merge.methods.iso_cts import split_rank
from lightning_merge.methods.score import resolve, trim
from lightning_merge.methods.ties import Survey
from tests.toys import base_weights, expert_weights, golden, golden_experts

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
    survey = Survey(torch.tensor([1.0, 1.0]), majority=lambda: torch.tensor(-1.0))
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
    assert all(split_rank(r, T, f)[0] >= 0 for r in range(1, 30) for T in range(1, 9) for f in (0.0, 0.1, 0.2))


def test_ties_finds_the_sign_that_most_entries_elect():
    deltas = [[-1.0, -1.0, -1.0, 2.0], [-1.0, -1.0, -1.0, -2.0]]
    merged = lm.merge({"w": torch.zeros(4)}, [{"w": torch.tensor(delta)} for delta in deltas], TIES(density=1.0))
    assert merged.weights["w"].tolist() == [-1.0, -1.0, -1.0, -2.0]  # the last mass is zero, the model's sign negative


def test_score_where_the_experts_do_not_divide_the_rank():
    """In the official basis, whose last columns LAPACK chose, the official numbers come out."""
    groups = golden("score_nondiv")
    for key, U in groups["basis_U64"].items():
        deltas = torch.stack([(e[key] - groups["pretrained"][key]).double() for e in golden_experts(groups)])
        found = resolve(U.mT @ deltas @ groups["basis_Vt64"][key].mT, "trimmed", 1.96, True, "code")
        torch.testing.assert_close(found, groups["sigma64_natural"][key], rtol=0, atol=1e-9)


@dataclass(frozen=True)
class Half(Wrapper):
    def transform(self, deltas, context):
        return deltas / 2


def test_a_wrapper_s_method_surveys_and_merges_what_it_transforms():
    base = base_weights()
    experts = [expert_weights(base, i) for i in range(3)]
    quarters = [{k: torch.lerp(base[k], e[k], 0.25) if e[k].is_floating_point() else e[k] for k in e} for e in experts]
    for method in (TIES(), TaskArithmetic()):
        twice = lm.merge(base, experts, Half(Half(method))).weights
        by_hand = lm.merge(base, quarters, method).weights
        for name in ("mlp.weight", "conv.weight"):
            torch.testing.assert_close(twice[name], by_hand[name], rtol=1e-4, atol=1e-6)


def test_a_model_for_each_task():
    base = base_weights()
    experts = {name: expert_weights(base, i) for i, name in enumerate("abc")}
    merged = lm.merge(base, experts, TALLMask())
    update = sum(expert["mlp.weight"] - base["mlp.weight"] for expert in experts.values())
    own = experts["b"]["mlp.weight"] - base["mlp.weight"]
    expected = base["mlp.weight"] + update * (own.abs() > 0.4 * (update - own).abs())
    torch.testing.assert_close(merged.for_task("b")["mlp.weight"], expected)
    torch.testing.assert_close(merged.weights["mlp.weight"], base["mlp.weight"] + update)


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
