"""A sweep gives what one merge per setting gives, bit for bit, and computes what settings share once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import lightning_merge as lm
from lightning_merge.merging.sweeping import SCALES, list_settings, with_setting
from lightning_merge.methods import CART, DARE, SCORE, STAR, TIES, IsoC, IsoCTS, KnOTS, LiNeS, TALLMask, TaskArithmetic
from lightning_merge.utilities import linalg
from lightning_merge.utilities.factorization_cache import Factorizations
from tests.toys import base_weights, expert_weights


def same(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def factorized(monkeypatch) -> Counter:
    """Counts how often each matrix is factorized, by its content."""
    counts: Counter = Counter()

    def counting(factorize):
        def counted(matrices, *args, **kwargs):
            counts[factorize.__name__, tuple(matrices.shape), matrices.numpy().tobytes()] += 1
            return factorize(matrices, *args, **kwargs)

        return counted

    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, counting(getattr(torch.linalg, name)))
    return counts


GRIDS = [
    (IsoC(), None),
    (TaskArithmetic(), {"scale": [0.5, 0, -1, 1.5]}),
    (IsoCTS(), {"scale": [0.5, 1.3], "common_fraction": [0.0, 0.5, 0.8, 1.0]}),
    (SCORE(), {"z": [0.5, 1.96, float("inf")], "mode": ["trimmed", "off_diagonal"]}),
    (TIES(scale=0.7), {"density": [0.1, 0.2, 1.0]}),
    (STAR(), {"eta": [10.0, 40.0]}),
    (CART(), {"rank_ratio": [0.2, 0.5], "coefficient": [0.5, 1.0]}),
    (DARE(method=TIES()), {"drop": [0.1, 0.5], "method.density": [0.5, 1.0]}),
    (LiNeS(method=KnOTS(method=TIES())), {"beta": [0.1, 0.5], "method.method.density": [0.2, 0.5]}),
]


@pytest.mark.parametrize(("method", "grid"), GRIDS, ids=lambda case: type(case).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_setting_is_a_merge_by_hand_bit_for_bit(method, grid, dtype):
    base = base_weights(dtype)
    experts = {name: expert_weights(base, i) for i, name in enumerate("abc")}
    settings = []
    for setting, merged in lm.sweep(base, experts, method, grid, seed=3, workers=2):
        by_hand = lm.merge(base, experts, with_setting(method, setting), seed=3)
        assert same(merged.weights, by_hand.weights)
        assert merged.manifest == by_hand.manifest
        settings.append(setting)
    assert settings == list_settings(method, grid)
    assert len(settings) > 1


def test_the_default_grid_is_that_of_the_papers():
    torch.testing.assert_close(torch.tensor(SCALES), torch.linspace(0, 3, 31)[1:])
    assert list_settings(IsoC()) == [{"scale": scale} for scale in SCALES]


def test_a_sweep_of_coefficients_is_one_merge(base, experts):
    updated = []

    @dataclass(frozen=True)
    class Counting(IsoC):
        def update(self, deltas, context):
            updated.append(context.name)
            return super().update(deltas, context)

    merges = list(lm.sweep(base, experts, Counting()))
    assert len(merges) == 30
    assert sorted(updated) == sorted(merges[0][1].inventory.merged)


def test_nothing_is_merged_before_it_is_asked_for_nor_when_it_is_skipped(base, experts):
    surveyed = []

    @dataclass(frozen=True)
    class Counting(TIES):
        def survey(self, task_vectors):
            surveyed.append(self.density)
            return super().survey(task_vectors)

    skipped = {0.2}
    grid = {"density": [0.1, 0.2, 0.3], "scale": [1, 2]}
    sweep = lm.sweep(base, experts, Counting(), grid, skip=lambda setting: setting["density"] in skipped)
    assert surveyed == []
    assert next(sweep)[0] == {"density": 0.1, "scale": 1}
    assert surveyed == [0.1]
    assert [setting for setting, _ in sweep] == [{"density": d, "scale": s} for d, s in ((0.1, 2), (0.3, 1), (0.3, 2))]
    assert surveyed == [0.1, 0.3]


class TestFactorizations:
    @pytest.mark.parametrize("grid", [{"z": [0.5, 1.0, 1.96, 3.0]}, {"z": [1.0, 2.0], "mode": ["trimmed", "full"]}])
    def test_another_threshold_of_score_needs_none(self, base, experts, factorized, grid):
        lm.merge(base, experts, SCORE())
        once = factorized.total()
        factorized.clear()
        settings = list(lm.sweep(base, experts, SCORE(), grid))
        assert len(settings) == 4
        assert factorized.total() == once > 0

    def test_the_sum_is_factorized_once_for_all_common_fractions(self, base, experts, factorized):
        fractions = [0.2, 0.4, 0.6, 0.8]
        for fraction in fractions:
            lm.merge(base, experts, IsoCTS(common_fraction=fraction))
        alone = factorized.copy()
        factorized.clear()
        for _ in lm.sweep(base, experts, IsoCTS(), {"common_fraction": fractions}):
            pass
        assert max(alone.values()) == len(fractions)
        assert max(factorized.values()) == 1
        assert set(factorized) == set(alone)

    @pytest.mark.parametrize(
        ("method", "grid"),
        [
            (STAR(), {"eta": [10.0, 20.0, 40.0]}),
            (CART(), {"rank_ratio": [0.2, 0.4, 0.6]}),
            (KnOTS(), {"method.density": [0.1, 0.2, 0.3]}),
        ],
    )
    def test_no_matrix_is_factorized_twice(self, base, experts, factorized, method, grid):
        for _ in lm.sweep(base, experts, method, grid):
            pass
        assert max(factorized.values()) == 1

    def test_they_are_reused_in_a_sweep_only(self, base, experts, factorized):
        for _ in lm.sweep(base, experts, SCORE(), {"z": [1.0, 2.0]}):
            factorized.clear()
            linalg.svd(torch.eye(3, dtype=torch.float64))
            linalg.svd(torch.eye(3, dtype=torch.float64))
            assert factorized.total() == 2

    def test_memory_is_bounded_and_the_results_are_the_same(self):
        draw = torch.Generator().manual_seed(0)
        matrices = [torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(5)]
        size = 8 * (4 + 16)  # eigenvalues and eigenvectors of a Gram matrix
        few = Factorizations(max_bytes=2 * size)
        for _ in range(3):
            with few.reused():
                for matrix in matrices:
                    assert all(map(torch.equal, linalg.svd(matrix, 2), linalg.svd(matrix, 2)))
            assert few.num_bytes == 2 * size

    def test_what_the_last_merge_did_not_ask_for_is_dropped(self, factorized):
        one, two = torch.eye(3, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64)
        factorizations = Factorizations()
        for matrix in (one, two, one):
            with factorizations.reused():
                linalg.polar(matrix)
        assert factorized.total() == 3

    def test_ranks_and_layouts_do_not_mix(self, factorized):
        matrix = torch.randn(5, 5, dtype=torch.float64)
        by_column = matrix.mT.contiguous().mT  # the same numbers in another order of memory
        cases = [(matrix, 2), (matrix.mT, 3), (matrix.float(), 3), (by_column, 4)]
        alone = [linalg.svd(*case) for case in cases]
        with Factorizations().reused():
            for _ in range(2):
                for case, expected in zip(cases, alone, strict=True):
                    assert all(map(torch.equal, linalg.svd(*case), expected))
        assert factorized.total() == 2 * len(cases)


class TestRescaled:
    @pytest.mark.parametrize("method", [TALLMask(), IsoC(), TIES()], ids=lambda method: type(method).__name__)
    def test_it_is_the_merge_with_that_coefficient(self, base, experts, method):
        kept = lm.merge(base, experts, method, keep_update=True, exclude=["head.*"])
        other = lm.merge(base, experts, type(method)(scale=0.37), exclude=["head.*"])
        for rescaled in (kept.rescaled(0.37), kept.rescaled(2.0).rescaled(0.37)):
            assert same(rescaled.weights, other.weights)
            assert rescaled.manifest == other.manifest
            assert same(rescaled.for_task("b"), other.for_task("b"))
        assert same(kept.weights, lm.merge(base, experts, method, exclude=["head.*"]).weights)

    def test_tied_weights_stay_tied(self, base, experts):
        for model in (base, *experts.values()):
            model["tied.weight"] = model["mlp.weight"]
        rescaled = lm.merge(base, experts, IsoC(), keep_update=True).rescaled(2)
        assert rescaled.weights["tied.weight"] is rescaled.weights["mlp.weight"]

    def test_without_its_update_it_cannot_be(self, base, experts):
        with pytest.raises(lm.MergeError, match="keep_update=True"):
            lm.merge(base, experts, IsoC()).rescaled(2)


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [
        (IsoC(), {"density": [0.1]}, "IsoC has no field 'density' to try values of; it has scale"),
        (IsoC(), {"method.density": [0.1]}, "IsoC has no field 'method.density'"),
        (DARE(method=TIES()), {"method.drop": [0.1]}, "TIES has no field 'drop'"),
        (IsoC(), {"scale": []}, "The grid's 'scale' is empty; give at least one"),
        (IsoC(), {"scale": 0.5}, "The grid's 'scale' must be a list of values to try, got 0.5"),
        (IsoC(), {"scale": "0.5"}, "must be a list"),
        (IsoC(), {"scale": [1.0, float("nan")]}, "IsoC: scale must be a finite number, got nan"),
        (IsoC(), {"scale": ["1.0"]}, "scale must be a finite number, got '1.0'"),
        (IsoC(), {"scale": [True]}, "scale must be a finite number, got True"),
        (IsoCTS(), {"common_fraction": [0.5, 1.5]}, r"common_fraction must lie in \[0, 1\], got 1.5"),
        (IsoCTS(), {"common_fraction": ["half"]}, "A value of the grid cannot be tried"),
        (TIES(), {"density": [0.0, 2.0]}, r"(?s)2 problems.*got 0.0.*got 2.0"),
        (SCORE(), {"mode": ["half"]}, "mode must be one of trimmed"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_before_anything_is_read(method, grid, message):
    with pytest.raises(lm.MergeError, match=message):
        lm.sweep("nowhere.ckpt", ["nowhere.ckpt"], method, grid)
