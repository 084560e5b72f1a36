"""Comparing experts, against the formulas on whole models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lightning_merge as lm
from lightning_merge.analysis import (
    Comparison,
    RankRule,
    compare_experts,
    effective_rank,
    pairwise_alignment,
    pairwise_angles,
    score_map,
    subspace_alignment_ratio,
)
from tests.toys import base_weights, expert_weights

NAMES = ("photo", "sketch", "cartoon")
SHARED = ["bn.weight", "conv.weight", "head.weight", "logit_scale", "mlp.bias", "mlp.weight", "proj.weight"]


@pytest.fixture
def base():
    return base_weights()


@pytest.fixture
def experts(base):
    return {name: expert_weights(base, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def merged(base, experts):
    methods = {"sum": lm.methods.TaskArithmetic(scale=1.0), "score": lm.methods.SCORE()}
    return {name: lm.merge(base, experts, method).weights for name, method in methods.items()}


def flat(base, weights, names=SHARED) -> torch.Tensor:
    return torch.cat([(weights[name] - base[name]).double().flatten() for name in names])


def stack(base, experts, name) -> torch.Tensor:
    return torch.stack([expert[name] - base[name] for expert in experts.values()])


def test_whole_task_vectors(base, experts, merged):
    found = compare_experts(base, experts, merged)
    assert sorted(parameter.name for parameter in found.parameters) == SHARED
    assert (tuple(found.experts), tuple(found.merged)) == (NAMES, ("sum", "score"))
    for names in (None, ["mlp.weight", "mlp.bias"]):
        vectors = torch.stack([flat(base, expert, names or SHARED) for expert in experts.values()])
        torch.testing.assert_close(found.norms(names), vectors.norm(dim=1))
        cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
        torch.testing.assert_close(found.cosines(names), cosines)
        assert found.mean_cosine(names) == pytest.approx(float(cosines.sum() - 3) / 6)
        different = (vectors > 0).any(dim=0) & (vectors < 0).any(dim=0)
        assert found.sign_conflict(names) == pytest.approx(float(different.double().mean()), abs=1e-6)
        for name, weights in merged.items():
            update = flat(base, weights, names or SHARED)
            torch.testing.assert_close(found.distances(name, names), (vectors - update).norm(dim=1))
            assert found.update_norm(name, names) == pytest.approx(float(update.norm()))
            assert found.update_ratio(name, names) == pytest.approx(float(update.norm() / vectors.norm(dim=1).mean()))
            expected = torch.nn.functional.cosine_similarity(vectors, update[None], dim=1)
            torch.testing.assert_close(found.merged_cosines(name, names), expected)


@pytest.mark.parametrize("rule", [{}, {"error": 0.3}, {"threshold": 0.9}, {"threshold": 0.9, "off_by_one": True}])
def test_subspaces_of_each_matrix(base, experts, merged, rule):
    found = compare_experts(base, experts, merged, **rule)
    rank_rule = RankRule(**rule or {"threshold": 0.97})
    assert found.rank_rule == str(rank_rule)
    assert [matrix.name for matrix in found.matrices] == ["mlp.weight", "proj.weight", "head.weight"]
    assert not found.left_out
    for matrix in found.matrices:
        deltas = stack(base, experts, matrix.name).double()
        close(matrix.spectra, torch.linalg.svdvals(deltas))
        close(matrix.alignment, pairwise_alignment(deltas, rank_rule))
        close(matrix.angles, pairwise_angles(deltas, rank_rule), 1e-3)
        close(matrix.effective_ranks, effective_rank(matrix.spectra))
        assert list(matrix.ranks) == [rank_rule.rank(s) for s in torch.linalg.svdvals(deltas)]
        score = score_map(deltas)
        close(matrix.resolved, score.resolved)
        energies = (matrix.kept, matrix.off_diagonal, matrix.agreement, matrix.conflict)
        expected = (score.kept, score.off_diagonal, score.agreement, score.conflict)
        assert energies == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert matrix.pruned == pytest.approx(1 - score.kept)
        for name, weights in merged.items():
            update = (weights[matrix.name] - base[matrix.name]).double()
            close(matrix.merged_spectra[name], torch.linalg.svdvals(update))
            arguments = {"error": rank_rule.error, "threshold": rank_rule.threshold, "off_by_one": rank_rule.off_by_one}
            close(matrix.merged_alignment[name], subspace_alignment_ratio(deltas, update, **arguments))
            spectrum = torch.linalg.svdvals(update)
            assert matrix.merged_effective_ranks[name] == pytest.approx(float(effective_rank(spectrum)), rel=1e-4)
    close(found.mean_alignment(), torch.stack([matrix.alignment for matrix in found.matrices]).mean(dim=0))
    close(found.mean_angles(), torch.stack([matrix.angles for matrix in found.matrices]).mean(dim=0))
    ratios = torch.stack([matrix.merged_alignment["score"] for matrix in found.matrices])
    close(found.mean_merged_alignment("score"), ratios.mean(dim=0))


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_profile_of_groups(base, experts, merged):
    found = compare_experts(base, experts, merged, subspaces=False)
    profile = found.profile()
    assert list(profile) == ["conv", "bn", "mlp", "proj", "logit_scale", "head"]
    names = ["mlp.weight", "mlp.bias"]
    vectors = torch.stack([flat(base, expert, names) for expert in experts.values()])
    torch.testing.assert_close(profile["mlp"].norms, vectors.norm(dim=1))
    assert profile["mlp"].cosine == pytest.approx(found.mean_cosine(names))
    assert profile["mlp"].sign_conflict == pytest.approx(found.sign_conflict(names))
    ratio = float(vectors.sum(dim=0).norm() / vectors.norm(dim=1).mean())
    assert profile["mlp"].update_ratios["sum"] == pytest.approx(ratio, rel=1e-5)
    assert list(found.profile(".*(?=weight)")) == ["conv.", "bn.", "mlp.", "other", "proj.", "head."]
    assert not found.matrices
    assert found.left_out == ["mlp.weight", "proj.weight", "head.weight"]


def test_any_number_of_workers_and_files_give_the_same(base, experts, merged):
    for name, weights in {"base": base, **experts, **merged}.items():
        lm.save_weights(f"{name}.safetensors", weights)
    files = {name: f"{name}.safetensors" for name in (*experts, *merged)}
    given = {name: files[name] for name in experts}, {name: files[name] for name in merged}
    found = [json.dumps(compare_experts(base, experts, merged).to_dict(), sort_keys=True)]
    found += [
        json.dumps(compare_experts("base.safetensors", *given, workers=workers).to_dict(), sort_keys=True)
        for workers in (1, 3)
    ]
    one, two, three = (json.loads(text) for text in found)
    assert two == three
    assert sorted(map(str, one["parameters"])) == sorted(map(str, two["parameters"]))


def test_a_single_merged_model_and_lists(base, experts, merged):
    by_name = compare_experts(base, experts, {"merged": merged["sum"]})
    single = compare_experts(base, list(experts.values()), merged["sum"])
    assert single.to_dict()["parameters"] == by_name.to_dict()["parameters"]
    lm.save_weights("sum.safetensors", merged["sum"])
    assert list(compare_experts(base, experts, "sum.safetensors", subspaces=False).merged) == ["merged"]
    assert list(compare_experts(base, experts, ["sum.safetensors"], subspaces=False).merged) == ["sum.safetensors"]


def test_zeros_one_expert_and_convolutions(base, experts):
    found = compare_experts(base, {"same": base, "photo": experts["photo"]}, {"same": base})
    matrix = found.matrices[0]
    assert matrix.alignment[0].isnan().all()
    assert matrix.alignment[1].tolist() == pytest.approx([0, float(matrix.alignment[1, 1])])
    assert matrix.angles[0].isnan().all()
    assert found.sign_conflict() != found.sign_conflict()  # NaN: nothing was moved by two
    assert found.mean_alignment()[0].isnan().all()
    assert found.update_ratio("same") == 0
    assert math.isnan(found.mean_cosine())
    again = Comparison.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again.matrices[0].alignment[0].isnan().all()

    alone = compare_experts(base, {"photo": experts["photo"]})
    assert alone.cosines().tolist() == [[pytest.approx(1)]]
    assert math.isnan(alone.mean_cosine())
    assert alone.matrices[0].resolved is None
    assert alone.matrices[0].pruned is None
    assert alone.mean_angles().tolist() == [[0]]

    kept = ("conv.weight", "bn.weight")
    networks = [{name: weights[name] for name in kept} for weights in (base, *experts.values())]
    found = compare_experts(networks[0], networks[1:])
    assert not found.matrices
    assert found.mean_alignment().isnan().all()
    seen = compare_experts(networks[0], networks[1:], matrices=lm.Matrices(flatten_convolutions=True))
    assert [matrix.shape for matrix in seen.matrices] == [(8, 12)]


def test_blocks_of_a_fused_projection(base, experts):
    found = compare_experts(base, experts, matrices=lm.Matrices(split=("mlp.*",)))
    names = [matrix.name for matrix in found.matrices]
    assert names == ["mlp.weight[0]", "mlp.weight[1]", "mlp.weight[2]", "proj.weight", "head.weight"]
    close(found.matrices[1].spectra, torch.linalg.svdvals(stack(base, experts, "mlp.weight")[:, 4:8]))


def test_more_experts_than_directions(base):
    found = compare_experts(base, [expert_weights(base, seed) for seed in range(4)])
    assert [matrix.resolved is None for matrix in found.matrices] == [False, False, True]  # the head has three rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    base = base_weights(dtype)
    experts = [expert_weights(base, seed) for seed in range(2)]
    found = compare_experts(base, experts)
    vectors = [
        torch.cat([(expert[name].double() - base[name].double()).flatten() for name in SHARED]) for expert in experts
    ]
    assert found.norms().tolist() == pytest.approx([float(vector.norm()) for vector in vectors], rel=1e-6)


def test_adapters_task_vectors_and_tied_weights(base, experts):
    tied = {**base, "other.weight": base["proj.weight"]}
    given = [{**expert, "other.weight": expert["proj.weight"]} for expert in experts.values()]
    assert sorted(parameter.name for parameter in compare_experts(tied, given).parameters) == SHARED
    lm.save_weights("base.safetensors", base)
    lm.save_weights("photo.safetensors", experts["photo"])
    lm.save_task_vector("tau.safetensors", "base.safetensors", "photo.safetensors")
    found = compare_experts("base.safetensors", {"photo": "photo.safetensors", "tau": "tau.safetensors"})
    assert found.cosines()[0, 1] == pytest.approx(1)


def test_adapters_have_the_rank_that_they_have(base):
    folders = {f"adapter_{i}": adapter(Path(f"adapter_{i}"), seed=i) for i in range(2)}
    lm.save_weights("base.safetensors", base)
    found = compare_experts("base.safetensors", folders)
    assert [matrix.name for matrix in found.matrices] == ["mlp.weight"]  # no expert has changed another one
    assert not found.left_out
    spectra = found.matrices[0].spectra
    assert (spectra[:, 2:] == 0).all()
    assert (spectra[:, :2] > 0.1).all()
    assert found.matrices[0].ranks == [2, 2]
    assert found.norms().tolist() == pytest.approx(spectra.norm(dim=1).tolist())


def adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of rank 2 of the layer ``mlp``, as peft writes it."""
    draw = torch.Generator().manual_seed(seed)
    factors = {"A": torch.randn(2, 8, generator=draw), "B": torch.randn(12, 2, generator=draw)}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    names = {f"base_model.model.mlp.lora_{key}.weight": factor for key, factor in factors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    return folder


def test_private_heads_are_excluded(base, experts):
    given = {name: {**expert, "head.weight": torch.randn(i + 1, 8)} for i, (name, expert) in enumerate(experts.items())}
    with pytest.raises(lm.MergeError, match="head"):
        compare_experts(base, given)
    found = compare_experts(base, given, exclude=["head.*"])
    assert sorted(parameter.name for parameter in found.parameters) == [n for n in SHARED if n != "head.weight"]


def test_what_does_not_fit_is_said(base, experts, merged):
    photo = experts["photo"]
    bad = {**photo, "mlp.bias": torch.full((12,), torch.nan)}
    with pytest.raises(lm.MergeError, match=r"'mlp.bias' of the expert bad holds values that are not finite"):
        compare_experts(base, {"photo": photo, "bad": bad})
    with pytest.raises(lm.MergeError, match=r"'mlp.bias' of the merged model bad holds"):
        compare_experts(base, experts, {"bad": bad})
    with pytest.raises(lm.MergeError, match=r"'mlp.bias' of the base holds"):
        compare_experts(bad, experts)
    less = {name: tensor for name, tensor in merged["sum"].items() if name != "proj.weight"}
    with pytest.raises(lm.MergeError, match=r"The merged model less lacks 'proj.weight'"):
        compare_experts(base, experts, {"less": less})
    with pytest.raises(lm.MergeError, match=r"'mlp.bias' has shape \(3,\) in the merged model odd and \(12,\) in the"):
        compare_experts(base, experts, {"odd": {**photo, "mlp.bias": torch.zeros(3)}})
    with pytest.raises(lm.MergeError, match="give one of the two"):
        compare_experts(base, experts, threshold=0.9, error=0.1)
    with pytest.raises(lm.MergeError, match="no experts"):
        compare_experts(base, [])
    with pytest.raises(lm.MergeError, match="workers must be at least 1, got 0"):
        compare_experts(base, experts, workers=0)


def test_what_takes_too_long_is_left_out(base, experts, monkeypatch):
    monkeypatch.setattr("lightning_merge.analysis.choosing.BUDGET", 50_000.0)
    found = compare_experts(base, experts)
    assert found.left_out
    assert found.matrices
    assert {matrix.name for matrix in found.matrices} | set(found.left_out) == {
        "mlp.weight",
        "proj.weight",
        "head.weight",
    }
    assert len(compare_experts(base, experts, every_matrix=True).matrices) == 3


def test_nothing_is_changed(base, experts, merged):
    models = [base, *experts.values(), *merged.values()]
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in models]
    compare_experts(base, experts, merged)
    for model, copy in zip(models, before, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in copy)


def test_what_is_stored_is_read_back(base, experts, merged):
    found = compare_experts(base, experts, merged)
    again = Comparison.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert (again.experts, again.merged, again.rank_rule) == (list(NAMES), ["sum", "score"], found.rank_rule)
    torch.testing.assert_close(again.cosines(), found.cosines(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(again.distances("score"), found.distances("score"), rtol=1e-9, atol=0)
    for own, other in zip(found.matrices, again.matrices, strict=True):
        close(other.spectra, own.spectra, 1e-3)
        close(other.alignment, own.alignment, 1e-3)
        close(other.resolved, own.resolved, 1e-3)
        assert other.kept == pytest.approx(own.kept, rel=1e-3)
        assert (other.shape, list(other.ranks)) == (own.shape, list(own.ranks))
    assert again.to_dict() == found.to_dict()
    with pytest.raises(lm.MergeError, match="no comparison of experts"):
        Comparison.from_dict({"experts": []})
    for name, value in (("products", [[1.0]]), ("products", "x"), ("moved", None), ("unknown", 1)):
        broken = json.loads(json.dumps(found.to_dict()))
        broken["parameters"][0][name] = value
        with pytest.raises(lm.MergeError, match="no comparison of experts"):
            Comparison.from_dict(broken)


def test_what_is_stored_of_a_large_matrix_is_small():
    draw = torch.Generator().manual_seed(0)
    shapes = {f"blocks.{i}.weight": (300, 280) for i in range(2)}
    models = [{name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} for _ in range(3)]
    found = compare_experts(models[0], models[1:])
    assert found.matrices[0].resolved.shape == (256, 256)
    text = json.dumps(found.to_dict())
    assert len(text) < 250_000
    again = Comparison.from_dict(json.loads(text))
    assert again.matrices[1].spectra.shape == (2, 256)
    assert again.matrices[1].resolved.shape == (64, 64)
    close(again.matrices[1].effective_ranks, found.matrices[1].effective_ranks, 1e-3)


def test_what_a_merge_returned_is_a_merged_model(base, experts):
    ours = lm.merge(base, experts, lm.methods.TaskArithmetic())
    found, same = (compare_experts(base, experts, given) for given in ({"ours": ours}, {"ours": ours.weights}))
    assert torch.equal(found.distances("ours"), same.distances("ours"))
    assert compare_experts(base, experts, ours).merged == ["merged"]
    assert repr(found).startswith("Comparison(")
    with pytest.raises(lm.MergeError, match="no merged model 'theirs'; there are ours"):
        found.distances("theirs")
    with pytest.raises(lm.MergeError, match="The merged model other has none of the"):
        compare_experts(base, experts, {"other": {"x": torch.zeros(2)}})
