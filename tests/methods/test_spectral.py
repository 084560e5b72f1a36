"""What must hold for the spectral methods on any input, and what their golden files do not cover."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_merge.checkpoints import open_weights
from lightning_merge.merging.merge import merge
from lightning_merge.methods.base import Context
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from lightning_merge.methods.cart import CART
from lightning_merge.methods.dc_merge import DCMerge
from lightning_merge.methods.iso_c import IsoC
from lightning_merge.methods.lines import LiNeS, block_index
from lightning_merge.methods.star import STAR, star
from lightning_merge.methods.svc import SVC, svc
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES
from lightning_merge.methods.tsv_c import TSVC, truncate
from lightning_merge.methods.tsv_m import TSVM, tsv_m
from lightning_merge.methods.weight_average import WeightAverage
from lightning_merge.methods.wudi import WUDI, wudi, wudi_closed_form
from lightning_merge.utilities.errors import MergeError

METHODS = [
    TSVM(),
    TSVM(variant="eig"),
    TSVM(variant="lossless"),
    TSVM(variant="low_rank"),
    TSVC(),
    STAR(),
    CART(),
    CART(rank_ratio=0.5, rounding="ceil"),
    DCMerge(),
    DCMerge(keep_fraction=1.0),
    SVC(),
    SVC(TSVM(), alpha=1.0),
    SVC(TSVC()),
    LiNeS(),
    LiNeS(TIES()),
    LiNeS(TSVC(), alpha=0.3),
    WUDI(iterations=5, parameters=("*",)),
    WUDI(closed_form=True, parameters=("*",), others="mean"),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(T, seed=0):
    base = {
        name: random(*shape, seed=seed)
        for name, shape in {"blocks.0.w": (6, 4), "blocks.1.w": (3, 8), "b": (5,), "g": (), "still": (4, 4)}.items()
    }
    experts = [
        {n: w if n == "still" else w + 0.1 * random(*w.shape, seed=seed + i + 1) for n, w in base.items()}
        for i in range(T)
    ]
    return base, experts


def updates(method, base, experts, matrices=Matrices()):  # noqa: B008
    task_vectors = ExpertTaskVectors(
        open_weights(base), [open_weights(e) for e in experts], list(base), method.dtype, matrices=matrices
    )
    survey = method.survey(task_vectors)
    contexts = {n: task_vectors.context(n, survey) for n in base}
    merged = {n: method.update(task_vectors[n], contexts[n]) for n in base}
    own = {n: method.task_update(task_vectors[n], len(experts) - 1, contexts[n]) for n in base}
    return merged, own


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("duplicate", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_is_finite_and_leaves_inputs_alone(method, T, duplicate):
    base, experts = model(T)
    if duplicate:
        experts = [{name: weight.clone() for name, weight in experts[0].items()} for _ in experts]
    before = [{name: weight.clone() for name, weight in e.items()} for e in (base, *experts)]
    for merged in updates(method, base, experts):
        assert all(u.isfinite().all() and u.shape == base[n].shape for n, u in merged.items())
        assert all(u.abs().max() < 1e3 for u in merged.values())
        assert not merged["still"].any()
    for old, new in zip(before, (base, *experts), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_zero_updates(method):
    base, _ = model(2)
    for merged in updates(method, base, [base, base]):
        assert not any(update.any() for update in merged.values())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_one_zero_expert(method):
    base, experts = model(3)
    for merged in updates(method, base, [experts[0], base, experts[1]]):
        assert all(update.isfinite().all() for update in merged.values())


MATRIX_BY_MATRIX = [
    *[TSVM(), TSVM(variant="lossless"), TSVC(), STAR(), CART(), DCMerge(), SVC(), SVC(TSVC()), LiNeS(alpha=0.3)],
    WUDI(parameters=("*",)),
    WUDI(closed_form=True, parameters=("*",)),
]


@pytest.mark.parametrize("method", MATRIX_BY_MATRIX, ids=repr)
def test_fused_projections_may_be_merged_apart(method):
    base = {"blocks.0.qkv": random(12, 5), "blocks.0.w": random(2, 2)}
    experts = [{n: w + random(*w.shape, seed=i) for n, w in base.items()} for i in (1, 2)]
    fused = updates(method, base, experts, Matrices(split=("*qkv",)))
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        apart = [{n: w[rows] if n.endswith("qkv") else w for n, w in e.items()} for e in (base, *experts)]
        for all_parts, one in zip(fused, updates(method, apart[0], apart[1:]), strict=True):
            torch.testing.assert_close(all_parts["blocks.0.qkv"][rows], one["blocks.0.qkv"])


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (TSVM, {"variant": "qr"}, "svd, eig, lossless, low_rank"),
        (STAR, {"eta": 0}, r"eta must lie in \(0, 100\]"),
        (STAR, {"eta": 101}, r"eta must lie in \(0, 100\]"),
        (CART, {"rank_ratio": 0}, r"rank_ratio must lie in \(0, 1\]"),
        (CART, {"coefficient": -1}, r"coefficient must lie in \[0, inf\)"),
        (CART, {"rounding": "round"}, "floor, ceil"),
        (DCMerge, {"keep_fraction": 0}, r"keep_fraction must lie in \(0, 1\]"),
        (SVC, {"alpha": 0}, r"alpha must lie in \(0, inf\)"),
        (LiNeS, {"alpha": -0.1}, r"alpha must lie in \[0, inf\)"),
        (LiNeS, {"beta": -0.1}, r"beta must lie in \[0, inf\)"),
        (LiNeS, {"num_blocks": 0}, r"num_blocks must lie in \[1, inf\)"),
        (WUDI, {"iterations": -1}, r"iterations must lie in \[0, inf\)"),
        (WUDI, {"lr": 0}, r"lr must lie in \(0, inf\)"),
        (WUDI, {"others": "keep"}, "base, mean"),
    ],
)
def test_bad_hyper_parameters(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)


def test_variants_of_one_expert_return_it():
    delta = random(1, 6, 4)
    for variant in ("svd", "eig", "lossless", "low_rank"):
        torch.testing.assert_close(tsv_m(delta, variant), delta[0])


def test_tsv_c_is_the_nearest_matrix_of_its_rank_and_for_task_returns_it():
    base, experts = model(2)
    merged = merge(base, dict(zip("ab", experts, strict=True)), TSVC())
    delta = experts[1]["blocks.0.w"] - base["blocks.0.w"]
    U, s, Vt = torch.linalg.svd(delta)
    expected = base["blocks.0.w"] + (U[:, :2] * s[:2]) @ Vt[:2]
    torch.testing.assert_close(merged.for_task("b")["blocks.0.w"], expected)
    torch.testing.assert_close(merged.for_task("b")["b"], experts[1]["b"])
    mean = torch.stack([merged.for_task(name)["blocks.0.w"] for name in "ab"]).mean(dim=0)
    torch.testing.assert_close(merged.weights["blocks.0.w"], mean)


def test_star_keeps_the_nuclear_norm_with_the_fewest_singular_values():
    deltas = torch.diag_embed(torch.tensor([[5.0, 3.0, 1.0, 1.0], [4.0, 4.0, 1.0, 1.0]], dtype=torch.float64))
    kept = star(deltas, eta=50).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(kept, torch.tensor([[10.0, 0, 0, 0], [5.0, 5.0, 0, 0]], dtype=torch.float64))
    deltas = random(3, 6, 4)
    torch.testing.assert_close(star(deltas, eta=100), deltas)


def test_cart_is_the_mean_for_coefficient_0_and_the_rank_is_rounded_as_said():
    deltas = random(3, 10, 9)
    context = Context("w")
    torch.testing.assert_close(CART(coefficient=0).update(deltas, context), deltas.mean(dim=0))
    mean = deltas.mean(dim=0)
    for rounding, rank in (("floor", 4), ("ceil", 5)):
        U, s, Vt = torch.linalg.svd(deltas - mean, full_matrices=False)
        expected = mean + 2 * sum((u[:, :rank] * x[:rank]) @ v[:rank] for u, x, v in zip(U, s, Vt, strict=True))
        merged = CART(rank_ratio=0.5, coefficient=2, rounding=rounding).update(deltas, context)
        torch.testing.assert_close(merged, expected)
    least = CART(rank_ratio=0.01).update(deltas, context)  # keeps one direction at least
    torch.testing.assert_close(least, mean + truncate(deltas - mean, 1).sum(dim=0))


def test_svc_gives_a_shared_direction_its_own_size_back():
    shared = random(6, 4)
    deltas = shared.expand(3, 6, 4)
    torch.testing.assert_close(svc(deltas.sum(dim=0), deltas), shared)
    U, s, Vt = torch.linalg.svd(random(6, 4), full_matrices=False)
    deltas = torch.stack([s[i] * torch.outer(U[:, i], Vt[i]) for i in range(3)])  # orthogonal experts
    # One of three projections is 1 and the other two are held up at alpha.
    torch.testing.assert_close(svc(deltas.sum(dim=0), deltas, 0.25), deltas.sum(dim=0) * 3 / 1.5)


def test_svc_is_not_misled_by_rounding():
    U, s, Vt = torch.linalg.svd(random(6, 4), full_matrices=False)
    deltas = torch.stack([s[i] * torch.outer(U[:, i], Vt[i]) for i in range(2)])
    noise = 1e-17 * random(2, 6, 4, seed=1)
    torch.testing.assert_close(svc((deltas + noise).sum(dim=0), deltas + noise, 0.5), deltas.sum(dim=0) * 2 / 1.5)


def test_svc_calibrates_at_the_scale_of_the_method_inside():
    base, experts = model(3)
    method = SVC(TaskArithmetic(scale=0.3))
    assert method.scale == 1.0
    merged, _ = updates(method, base, experts)
    deltas = torch.stack([e["blocks.0.w"] - base["blocks.0.w"] for e in experts])
    torch.testing.assert_close(merged["blocks.0.w"], svc(0.3 * deltas.sum(dim=0), deltas))
    bias = sum(e["b"] - base["b"] for e in experts)
    torch.testing.assert_close(merged["b"], 0.3 * bias)


def test_lines_coefficients():
    base = {f"resblocks.{i}.w": random(3, 3, seed=i) for i in (0, 1, 10)} | {"w": random(2)}
    experts = [{n: w + random(*w.shape, seed=20 + i) for n, w in base.items()} for i in range(2)]
    merged, own = updates(LiNeS(TaskArithmetic(scale=0.3), alpha=0.2, beta=0.5), base, experts)
    for name, coefficient in {"resblocks.0.w": 0.2, "resblocks.1.w": 0.25, "resblocks.10.w": 0.7, "w": 0.2}.items():
        total = sum(e[name] - base[name] for e in experts)
        torch.testing.assert_close(merged[name].double(), coefficient * total, rtol=1e-5, atol=1e-6)
        assert torch.equal(own[name], merged[name])
    assert [block_index(n) for n in ("visual.blocks.3.mlp.0.w", "0.w", "layer1.w", "cls")] == [3, 0, None, None]


def test_lines_alpha_matches_the_sum_of_the_task_vectors():
    base, experts = model(4)
    for inner in (WeightAverage(), TIES(), TaskArithmetic(), IsoC()):
        method = LiNeS(inner, beta=0)
        merged, _ = updates(method, base, experts)
        size = sum(float(update.abs().sum()) for update in merged.values())
        total = sum(float(sum(e[n] - base[n] for e in experts).abs().sum()) for n in base)
        assert math.isclose(size, total / 4, rel_tol=1e-5)


def test_lines_keeps_a_model_for_each_task():
    base, experts = model(2)
    method = LiNeS(TSVC(), alpha=1.0, beta=1.0)
    assert method.per_task
    _, own = updates(method, base, experts)
    torch.testing.assert_close(own["b"], (experts[1]["b"] - base["b"]).to(method.dtype))
    _, compressed = updates(TSVC(), base, experts)
    torch.testing.assert_close(own["blocks.1.w"], 2 * compressed["blocks.1.w"])


def wudi_loss(merged, deltas):
    return sum(((merged - d) @ d.T).square().sum() / d.square().sum() for d in deltas)


def test_wudi_steps_are_adams():
    deltas = random(3, 5, 4)
    merged = torch.nn.Parameter(deltas.sum(dim=0))
    optimizer = torch.optim.Adam([merged], lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        wudi_loss(merged, deltas).backward()
        optimizer.step()
    torch.testing.assert_close(wudi(deltas, iterations=20, lr=1e-3), merged.detach())


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 9), (1, 4, 4)])
def test_wudi_closed_form_is_the_minimum(shape):
    deltas = random(*shape)
    merged = wudi_closed_form(deltas).requires_grad_()
    (gradient,) = torch.autograd.grad(wudi_loss(merged, deltas), merged)
    assert gradient.abs().max() < 1e-10
    assert wudi_loss(merged, deltas) <= wudi_loss(wudi(deltas), deltas) + 1e-20
    squares = deltas.square().sum(dim=(1, 2), keepdim=True)
    S = (deltas.mT @ deltas / squares).sum(dim=0)
    R = (deltas @ deltas.mT @ deltas / squares).sum(dim=0)
    torch.testing.assert_close(merged.detach(), R @ torch.linalg.pinv(S, hermitian=True, rtol=1e-12))


def test_wudi_merges_what_it_is_told():
    base, experts = model(2)
    merged, _ = updates(WUDI(parameters=("blocks.0.*",)), base, experts)
    assert [name for name, update in merged.items() if update.any()] == ["blocks.0.w"]
    merged, _ = updates(WUDI(parameters=("blocks.0.*",), others="mean"), base, experts)
    for name in ("blocks.1.w", "b"):
        mean = torch.stack([e[name] - base[name] for e in experts]).mean(dim=0)
        torch.testing.assert_close(merged[name], mean)


def test_wudi_refuses_a_model_without_such_parameters():
    base, experts = model(2)
    with pytest.raises(MergeError, match=r"in_proj_weight.*names look like blocks\.0\.w"):
        merge(base, experts, WUDI())
