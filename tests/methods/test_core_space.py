"""Core Space: against a dense statement of its formula, and the adapters of a golden file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.checkpoints import open_adapter, open_weights
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.cart import CART
from lightning_merge.methods.core_space import CoreSpace, reference_bases
from lightning_merge.methods.iso_c import IsoC
from lightning_merge.methods.knots import KnOTS
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES
from lightning_merge.methods.tsv_m import TSVM, tsv_m
from tests.methods.test_golden_spectral import load


def write_adapters(folder, groups, scaling=1.0):
    """The golden file's factors as peft would write them."""
    folders = []
    for i in range(4):
        tensors = {}
        for name in groups["lora_A0"]:
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = groups[f"lora_A{i}"][name]
            tensors[f"{stem}.lora_B.weight"] = groups[f"lora_B{i}"][name]
        folders.append(folder / str(i))
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * scaling}
        (folders[-1] / "adapter_config.json").write_text(json.dumps(config))
    return folders


def merge_all(method, base, experts):
    weights = [open_weights(e) for e in experts]
    task_vectors = ExpertTaskVectors(open_weights(base), weights, list(base), torch.float64)
    survey = method.survey(task_vectors)
    return {n: method.update(task_vectors[n], task_vectors.context(n, survey)) for n in base}


@pytest.fixture
def groups():
    return load("knots_lora")


@pytest.fixture
def adapters(tmp_path, groups):
    return [open_adapter(folder, groups["pretrained"]) for folder in write_adapters(tmp_path, groups)]


def test_the_reader_gives_the_golden_experts(groups, adapters):
    for i, adapter in enumerate(adapters):
        for name, expected in groups[f"expert{i}"].items():
            torch.testing.assert_close(adapter[name], expected, rtol=0, atol=1e-7)


def test_knots_from_adapters_is_the_authors(groups, adapters):
    for name, update in merge_all(KnOTS(TIES(scale=0.6)), groups["pretrained"], adapters).items():
        torch.testing.assert_close(0.6 * update, groups["merged_tv"][name].double(), rtol=0, atol=1e-6)


def dense_core_space(groups, name, rule):
    """The formula: reference bases from the stacked factors, core matrices from each expert's own SVDs."""
    A = [groups[f"lora_A{i}"][name].double() for i in range(4)]
    B = [groups[f"lora_B{i}"][name].double() for i in range(4)]
    V = torch.linalg.svd(torch.cat(A, dim=0), full_matrices=False)[2]
    U = torch.linalg.svd(torch.cat(B, dim=1), full_matrices=False)[0]
    cores = []
    for a, b in zip(A, B, strict=True):
        Ua, sa, Va = torch.linalg.svd(a, full_matrices=False)
        Ub, sb, Vb = torch.linalg.svd(b, full_matrices=False)
        cores.append((U.T @ Ub) @ (torch.diag(sb) @ Vb @ Ua @ torch.diag(sa)) @ (Va @ V.T))
    return U @ rule(torch.stack(cores)) @ V


def official_ties(cores, k=0.2):
    """TIES of one matrix at a time, whose magnitudes and signs do not depend on the signs of singular vectors."""
    flat = cores.flatten(1)
    d = flat.shape[1]
    kth = flat.abs().kthvalue(d - int(d * k), dim=1, keepdim=True).values
    flat = flat * (flat.abs() >= kth)
    sign = flat.sum(dim=0).sign()
    kept = flat * (flat.sign() == sign)
    return (kept.sum(dim=0) / (kept != 0).sum(dim=0).clamp(min=1)).reshape(cores.shape[1:])


def flat_spectrum(matrix):
    U, s, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return s.mean() * U @ Vt


RULES = [
    (CoreSpace(TaskArithmetic()), lambda M: M.sum(dim=0)),
    (CoreSpace(), tsv_m),
    (CoreSpace(TSVM(), isotropize=True), lambda M: flat_spectrum(tsv_m(M))),
    (CoreSpace(IsoC()), lambda M: flat_spectrum(M.sum(dim=0))),
    (CoreSpace(TIES()), official_ties),
]


@pytest.mark.parametrize(("method", "rule"), RULES)
def test_formula(groups, adapters, method, rule):
    merged = merge_all(method, groups["pretrained"], adapters)
    for name, update in merged.items():
        expected = dense_core_space(groups, name, rule)
        # The experts are float32: their differences to the base are B A up to 1e-8.
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [TaskArithmetic(), TSVM(), IsoC(), CART()])
def test_dense_experts_give_the_same_where_the_rule_commutes_with_rotations(groups, adapters, method):
    dense = [{name: w.clone() for name, w in adapter.items()} for adapter in adapters]
    from_dense = merge_all(CoreSpace(method), groups["pretrained"], dense)
    for name, update in merge_all(CoreSpace(method), groups["pretrained"], adapters).items():
        torch.testing.assert_close(from_dense[name], update, rtol=0, atol=1e-6)


def test_nothing_is_lost(groups, adapters):
    task_vectors = ExpertTaskVectors(
        open_weights(groups["pretrained"]), adapters, list(groups["pretrained"]), torch.float64
    )
    for name, deltas in task_vectors.items():
        U, Vt = reference_bases([(B.double(), A.double()) for B, A in task_vectors.factors(name)])
        assert U.shape[1] == len(Vt) == 8  # four experts of rank 2
        torch.testing.assert_close(U @ (U.T @ deltas @ Vt.T) @ Vt, deltas, rtol=0, atol=1e-7)


@dataclass(frozen=True)
class AddOnes(Wrapper):
    """Changes what the method inside sees."""

    def transform(self, deltas, context):
        return deltas + 1


def test_factors_are_not_trusted_where_they_do_not_span_the_experts(tmp_path, groups, adapters):
    base = groups["pretrained"]
    generator = torch.Generator().manual_seed(0)
    dense = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in base.items()}
    mixed = [*adapters, dense]
    method = CoreSpace(TaskArithmetic())
    for name, update in merge_all(method, base, mixed).items():
        torch.testing.assert_close(update, sum(e[name].double() - base[name] for e in mixed), rtol=0, atol=1e-6)
    for name, update in merge_all(AddOnes(method), base, adapters).items():
        torch.testing.assert_close(update, sum(e[name].double() - base[name] + 1 for e in adapters), rtol=0, atol=1e-6)
    name = "blocks.0.fc.weight"
    folder = tmp_path / "whole"
    folder.mkdir()
    save_file({f"base_model.model.{name}": dense[name]}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    mixed = [*adapters, open_adapter(folder, base)]
    total = sum(e[name].double() - base[name] for e in mixed)
    torch.testing.assert_close(merge_all(method, base, mixed)[name], total, rtol=0, atol=1e-6)


def test_the_method_inside_may_survey_all_layers_together(groups, adapters):
    apart = merge_all(CoreSpace(TIES()), groups["pretrained"], adapters)
    together = merge_all(CoreSpace(TIES(), per_layer=False), groups["pretrained"], adapters)
    assert any(not torch.allclose(apart[name], together[name]) for name in apart)


@pytest.mark.parametrize("method", [CoreSpace(), CoreSpace(TIES()), CoreSpace(TIES(), per_layer=False)])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_is_finite_and_leaves_inputs_alone(method, T):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(5, 4, generator=generator), "b": torch.randn(5), "still": torch.randn(3, 3)}
    experts = [
        base | {n: base[n] + torch.randn(base[n].shape, generator=generator) for n in ("w", "b")} for _ in range(T)
    ]
    experts[-1] = {name: weight.clone() for name, weight in experts[0].items()}
    before = [{name: weight.clone() for name, weight in e.items()} for e in (base, *experts)]
    merged = merge_all(method, base, experts)
    assert all(update.isfinite().all() and update.shape == base[n].shape for n, update in merged.items())
    assert not merged["still"].any()
    torch.testing.assert_close(merged["b"], torch.stack([e["b"].double() - base["b"] for e in experts]).mean(dim=0))
    for old, new in zip(before, (base, *experts), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_zero_updates():
    base = {"w": torch.ones(3, 4), "b": torch.ones(3)}
    for method in (CoreSpace(), CoreSpace(TIES(), per_layer=False)):
        assert not any(update.any() for update in merge_all(method, base, [base, base]).values())


def test_bad_hyper_parameters():
    with pytest.raises(ValueError, match=r"sv_threshold must lie in \[0, inf\)"):
        CoreSpace(sv_threshold=math.nan)
    assert CoreSpace(TIES(scale=0.3)).scale == 0.3
