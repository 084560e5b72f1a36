"""Every method equals what its authors' code computed."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.checkpoints import open_weights
from lightning_merge.methods import SCORE, TIES, TSVM, IsoC, IsoCTS, MagMax, TaskArithmetic, WeightAverage
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.score import resolve
from lightning_merge.methods.tsv_m import task_singular_basis
from tests.toys import golden, golden_experts

# golden file, method, group of tensors, whether the group holds weights (else updates), tolerance
CASES = [
    ("task_arithmetic", TaskArithmetic(scale=0.3), "merged", True, 0),
    ("task_arithmetic", WeightAverage(), "merged_average", True, 1e-7),
    ("ties", TIES(), "merged", True, 0),
    ("ties", TIES(density=0.1), "ties_topk10_mass_dis-mean", False, 0),
    ("ties", TIES(merge="sum"), "ties_topk20_mass_dis-sum", False, 0),
    ("ties", TIES(merge="max"), "ties_topk20_mass_dis-max", False, 0),
    ("magmax", MagMax(), "merged", True, 0),
    ("magmax", MagMax(scale=1.0), "merged_lambda1", True, 0),
    ("tsvm", TSVM(), "tsvm64", False, 1e-9),
    ("tsvm_nondiv", TSVM(), "tsvm64", False, 1e-9),
    ("iso_c", IsoC(), "tv64", False, 1e-9),
    ("iso_c_nondiv", IsoC(), "tv64", False, 1e-9),
    ("iso_cts", IsoCTS(), "tv64", False, 1e-9),
    ("iso_cts_frac05", IsoCTS(common_fraction=0.5), "tv64", False, 1e-9),
    ("iso_cts_nondiv", IsoCTS(), "tv64", False, 1e-9),
    ("iso_cts_nondiv_frac05", IsoCTS(common_fraction=0.5), "tv64", False, 1e-9),
    ("score", SCORE(mode="diagonal"), "tv64_diag_v2", False, 1e-9),
]


@pytest.mark.parametrize(("name", "method", "group", "is_weights", "tolerance"), CASES)
def test_method_equals_the_official_code(name, method, group, is_weights, tolerance):
    _compare(name, method, group, is_weights, tolerance, torch.float64 if "64" in group else method.dtype)


@pytest.mark.parametrize(("name", "method", "group"), [case[:3] for case in CASES if "64" in case[2]])
def test_in_float32_too(name, method, group):
    """Task vectors in float32, factorized in float64: the entries of these updates are about 1e-3 to 1e-1."""
    _compare(name, method, group, False, 3e-7, torch.float32)


def _compare(name, method, group, is_weights, tolerance, dtype):
    groups = golden(name)
    base = groups["pretrained"]
    vectors = ExpertTaskVectors(
        open_weights(base), [open_weights(e) for e in golden_experts(groups)], list(base), dtype
    )
    survey = method.survey(vectors)
    assert groups[group].keys() == base.keys()
    for key, expected in groups[group].items():
        found = method.update(vectors[key], vectors.context(key, survey))
        if is_weights:
            found = (base[key] + method.scale * found).to(base[key])
        torch.testing.assert_close(found, expected.to(found), rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def _score_inputs():
    groups = golden("score")
    for key, U in groups["basis_U64"].items():
        deltas = torch.stack([(e[key] - groups["pretrained"][key]).double() for e in golden_experts(groups)])
        yield groups, key, deltas, U, groups["basis_Vt64"][key]


@pytest.mark.parametrize(("setting", "divide"), [("natural", True), ("medical", False)])
def test_score_trims_as_the_official_code_in_its_basis(setting, divide):
    """Singular vectors have free signs and SCORE depends on them, so the official basis is taken as it is."""
    for groups, key, deltas, U, Vt in _score_inputs():
        found = resolve(U.mT @ deltas @ Vt.mT, "trimmed", 1.96, divide, "code")
        torch.testing.assert_close(found, groups[f"sigma64_{setting}"][key], rtol=0, atol=1e-9)
        torch.testing.assert_close(U @ found @ Vt, groups[f"tv64_{setting}"][key], rtol=0, atol=1e-9)


def test_score_off_diagonal_is_what_the_official_code_does():
    for groups, key, deltas, U, Vt in _score_inputs():
        found = U @ resolve(U.mT @ deltas @ Vt.mT, "off_diagonal", 1.96, True, "code") @ Vt
        torch.testing.assert_close(found, groups["tv64_offdiag_v3"][key], rtol=0, atol=1e-9)


def test_score_builds_the_official_basis_up_to_signs():
    for _, _, deltas, official_U, official_Vt in _score_inputs():
        U, _, Vt = task_singular_basis(deltas)
        same = torch.eye(U.shape[1], dtype=torch.float64)
        torch.testing.assert_close((U.mT @ official_U).abs(), same, rtol=0, atol=1e-9)
        torch.testing.assert_close((Vt @ official_Vt.mT).abs(), same, rtol=0, atol=1e-9)


def test_what_the_official_full_adds():
    """Its `full` adds 1.0 per expert to every entry of the diagonal sum, and never the off-diagonals."""
    for groups, key, deltas, U, Vt in _score_inputs():
        projections = U.mT @ deltas @ Vt.mT
        bug = U @ (resolve(projections, "diagonal", 0, True, "code") + len(deltas)) @ Vt
        torch.testing.assert_close(bug, groups["tv64_full_v4_upstream_bug"][key], rtol=0, atol=1e-9)
