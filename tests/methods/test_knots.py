"""KnOTS: against the authors' outputs, and what must hold for any input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from lightning_merge.checkpoints import open_weights
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.base.wrapper import Wrapper
from lightning_merge.methods.knots import KnOTS, common_basis
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES
from lightning_merge.methods.tsv_m import TSVM
from tests.methods.test_golden_spectral import GOLDEN, load, open_task_vectors, worst

CASES = [
    (KnOTS(TIES(scale=0.6)), "merged_tv", "scaled", 1e-7),
    (KnOTS(TIES(scale=0.6)), "merged", "model", 5e-7),
    (KnOTS(TIES(scale=0.6)), "knots_ties20_mean_s06", "model", 5e-7),
    (KnOTS(TIES(density=1.0, scale=0.5)), "knots_ties100_mean_s05", "model", 5e-7),
    (KnOTS(TaskArithmetic(scale=0.3)), "knots_tv_sum_s03", "model", 5e-7),
]


@pytest.mark.parametrize("name", ["knots_fft", "knots_lora"])
@pytest.mark.parametrize(("method", "group", "form", "tolerance"), CASES)
def test_official(name, method, group, form, tolerance):
    groups = load(name)
    assert set(groups[group]) == set(groups["pretrained"])
    assert worst(groups, group, method, form=form) <= tolerance


def test_official_ties_without_knots():
    assert worst(load("knots_lora"), "vector_ties30_mean_s03", TIES(density=0.3, scale=0.3), form="model") <= 5e-7


@dataclass(frozen=True)
class OfficialDARE(Wrapper):
    """DARE with the official code's masks, drawn from one stream for all experts and layers."""

    method: TIES = TIES(density=1.0)  # noqa: RUF009
    p: float = 0.1

    def transform(self, deltas, context):
        return deltas * self.masks[context.name] / (1 - self.p)

    def survey(self, task_vectors):
        torch.manual_seed(421)
        masks = [
            {
                name: torch.randint(2, size=deltas[0].shape, dtype=torch.float32).bernoulli(1 - self.p)
                for name, deltas in task_vectors.items()
            }
            for _ in range(4)
        ]
        object.__setattr__(self, "masks", {name: torch.stack([m[name] for m in masks]) for name in task_vectors})
        return super().survey(task_vectors)


@pytest.mark.parametrize("name", ["knots_fft", "knots_lora"])
def test_official_dare(name):
    groups = load(name)
    state = torch.get_rng_state()
    try:
        deviation = worst(groups, "knots_dare01_ties100_s07", KnOTS(OfficialDARE(scale=0.7)), form="model")
    finally:
        torch.set_rng_state(state)
    assert deviation <= 5e-7


def merge_all(method, base, experts, dtype=torch.float64):
    task_vectors = ExpertTaskVectors(open_weights(base), [open_weights(e) for e in experts], list(base), dtype)
    survey = method.survey(task_vectors)
    return {n: method.update(task_vectors[n], task_vectors.context(n, survey)) for n in base}


def model(seed, T=3, zero=()):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "stem.weight": (6, 2, 2, 2), "stem.bias": (6,), "norm.weight": (6,), "norm.bias": (6,), "fc.weight": (4, 6),
        "fc.bias": (4,), "up.weight": (6, 3, 2, 2), "up.bias": (3,), "token": (6,), "gain.weight": (), "w": (5, 2),
    }  # fmt: skip
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    experts = [
        {n: w if n in zero else w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
        for _ in range(T)
    ]
    return base, experts


@pytest.mark.parametrize("concat_across_output", [True, False])
@pytest.mark.parametrize("layers", ["official", "matrices"])
def test_a_sum_is_the_same_in_every_basis(layers, concat_across_output):
    base, experts = model(0)
    method = KnOTS(TaskArithmetic(), layers=layers, concat_across_output=concat_across_output)
    merged = merge_all(method, base, experts)
    for name, weight in base.items():
        deltas = torch.stack([e[name] - weight for e in experts]).double()
        expected = deltas.sum(dim=0)
        if layers == "official":
            expected = expected * (name not in ("token", "up.bias", "w"))
        elif weight.ndim != 2:
            expected = deltas.mean(dim=0)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-12)


def test_the_experts_coordinates_are_those_of_the_joint_decomposition():
    deltas = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, s, Vt = torch.linalg.svd(torch.cat(list(deltas), dim=1), full_matrices=False)
    coordinates = torch.cat(list(common_basis(deltas).mT @ deltas), dim=1)
    torch.testing.assert_close(coordinates.abs(), (s.unsqueeze(1) * Vt).abs())


def test_the_threshold_drops_directions():
    base, experts = model(2)
    assert not any(update.any() for update in merge_all(KnOTS(TIES(), sv_threshold=1e3), base, experts).values())


@pytest.mark.parametrize("method", [KnOTS(), KnOTS(TSVM()), KnOTS(KnOTS(), layers="matrices")])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_is_finite_and_leaves_inputs_alone(method, T):
    base, experts = model(3, T, zero=("fc.weight", "fc.bias"))
    experts[-1] = {name: weight.clone() for name, weight in experts[0].items()}  # a duplicate
    before = [{name: weight.clone() for name, weight in e.items()} for e in (base, *experts)]
    merged = merge_all(method, base, experts)
    assert all(update.isfinite().all() and update.shape == base[n].shape for n, update in merged.items())
    assert not merged["fc.weight"].any()
    assert not merged["fc.bias"].any()
    for old, new in zip(before, (base, *experts), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_zero_updates():
    base, _ = model(4)
    assert not any(update.any() for update in merge_all(KnOTS(), base, [base, base]).values())


def test_ties_thresholds_are_those_of_all_layers_together():
    base, experts = model(5)
    experts = [{n: w if n == "fc.weight" else base[n] + 100 * (w - base[n]) for n, w in e.items()} for e in experts]
    merged = merge_all(KnOTS(TIES(density=0.25), layers="matrices"), base, experts)
    assert merged["w"].any()
    assert not merged["fc.weight"].any()  # all of its entries are among the smaller three quarters


@dataclass(frozen=True)
class Drop(Wrapper):
    """A random method inside."""

    def transform(self, deltas, context):
        return deltas * torch.rand(deltas.shape, generator=context.generator()).ge(0.5)


def test_random_methods_inside_do_not_depend_on_the_order():
    base, experts = model(6)
    method = KnOTS(Drop(TIES()))
    merged = merge_all(method, base, experts)
    backwards = merge_all(method, dict(reversed(base.items())), experts)
    assert all(torch.equal(merged[name], backwards[name]) for name in base)
    assert not torch.equal(merged["fc.weight"], merge_all(KnOTS(TIES()), base, experts)["fc.weight"])


@dataclass(frozen=True)
class Own(TaskArithmetic):
    """Keeps every expert's own update."""

    def task_update(self, deltas, expert, context):
        return deltas[expert]


def test_a_method_inside_may_keep_a_model_for_each_task():
    base, experts = model(7)
    task_vectors = ExpertTaskVectors(open_weights(base), [open_weights(e) for e in experts], list(base), torch.float64)
    method = KnOTS(Own())
    survey = method.survey(task_vectors)
    for name in ("fc.weight", "fc.bias", "norm.weight", "stem.weight"):
        update = method.task_update(task_vectors[name], 1, task_vectors.context(name, survey))
        torch.testing.assert_close(update, task_vectors[name][1], rtol=0, atol=1e-12)


def test_golden_ranks_are_those_of_the_authors():
    import json

    groups = load("knots_fft")
    ranks = json.loads((GOLDEN / "knots_fft.json").read_text())["hparams"]["layer_rank"]
    bases = KnOTS().survey(open_task_vectors(groups)).bases
    found = {key.removesuffix(".weight").removesuffix("_weight"): U.shape[1] for key, U in bases.items()}
    assert found == ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"sv_threshold": -1e-5}, r"sv_threshold must lie in \[0, inf\)"), ({"layers": "all"}, "official, matrices")],
)
def test_bad_hyper_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        KnOTS(**arguments)


def test_the_scale_is_that_of_the_method_inside():
    assert KnOTS(TIES(scale=0.6)).scale == 0.6
    assert math.isclose(KnOTS(TIES(scale=0.6), scale=0.5).scale, 0.5)
    assert KnOTS().describe()["init_args"]["method"]["class_path"] == "TIES"
