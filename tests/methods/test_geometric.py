"""Methods that look at the weights as points: Model Stock, SLERP, Multi-SLERP, Karcher, soups, DOGE."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_merge.merging.greedy_soup import greedy_soup
from lightning_merge.merging.merge import merge
from lightning_merge.merging.toy_models import make_models
from lightning_merge.methods import Context, WeightAverage
from lightning_merge.methods.doge import DOGE, shared_subspace
from lightning_merge.methods.karcher import Karcher, karcher_mean, logarithm
from lightning_merge.methods.model_stock import ModelStock, mean_cosine, model_stock
from lightning_merge.methods.multi_slerp import MultiSLERP, multi_slerp
from lightning_merge.methods.slerp import SLERP, slerp
from lightning_merge.methods.soup import Soup
from lightning_merge.utilities.errors import MergeError

SHAPE = (5, 4)


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(7)


def vectors(draw, T=3, d=20):
    return torch.randn(T, d, generator=draw, dtype=torch.float64)


# Model Stock


def test_model_stock_is_the_foot_of_the_perpendicular_from_the_centre():
    # The paper's geometry: experts at equal distance from their centre, in directions orthogonal to each other.
    T, centre, noise = 4, 2.0, 3.0
    deltas = torch.zeros(T, 1, T + 1, dtype=torch.float64)
    deltas[:, 0, 0] = centre
    deltas[range(T), 0, range(1, T + 1)] = noise
    merged = model_stock(deltas)
    mean = deltas.mean(dim=0)
    gap = torch.zeros_like(mean)
    gap[0, 0] = centre
    assert abs(float(((gap - merged) * mean).sum())) < 1e-12
    torch.testing.assert_close(merged, mean * centre**2 / (centre**2 + noise**2 / T))


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_states_the_formula(draw, filter_wise):
    deltas = vectors(draw, 3, 20).reshape(3, *SHAPE) + 3.0  # no angle above 90°
    rows = deltas if filter_wise else deltas.reshape(3, 1, -1)
    pairs = [torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=-1) for i, j in ((0, 1), (0, 2), (1, 2))]
    cos = sum(pairs) / 3
    expected = (3 * cos / (1 + 2 * cos)).unsqueeze(-1) * rows.mean(dim=0)
    found = ModelStock(filter_wise=filter_wise).update(deltas, Context("w"))
    torch.testing.assert_close(found, expected.reshape(SHAPE), rtol=1e-12, atol=1e-12)


def test_model_stock_takes_filters_of_kernels_and_vectors_as_one_row(draw):
    kernel = vectors(draw, 3, 48).reshape(3, 4, 3, 2, 2) + 1
    vector = vectors(draw, 3, 6) + 1
    method = ModelStock(filter_wise=True)
    found = method.update(kernel, Context("conv"))
    torch.testing.assert_close(found, method.update(kernel.flatten(2), Context("matrix")).reshape(kernel.shape[1:]))
    torch.testing.assert_close(method.update(vector, Context("b")), ModelStock().update(vector, Context("b")))


def test_model_stock_keeps_the_base_where_experts_pull_apart():
    deltas = torch.tensor([[1.0, 0.0], [-2.0, 0.1]], dtype=torch.float64)
    assert float(mean_cosine(deltas)) < 0
    assert not ModelStock().update(deltas, Context("b")).any()
    scalars = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)  # the formula divides by zero here
    assert ModelStock().update(scalars, Context("logit_scale")) == 0


# SLERP


def slerp_by_hand(t, a, b):
    dot = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    theta = np.arccos(dot)
    return np.sin((1 - t) * theta) / np.sin(theta) * a + np.sin(t * theta) / np.sin(theta) * b


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_states_the_formula(draw, t):
    a, b = vectors(draw, 2)
    expected = torch.from_numpy(slerp_by_hand(t, a.numpy(), b.numpy()))
    torch.testing.assert_close(slerp(a, b, t), expected)
    base = torch.randn(SHAPE, generator=draw, dtype=torch.float64)
    deltas = torch.stack([a.reshape(SHAPE) - base, b.reshape(SHAPE) - base])
    torch.testing.assert_close(SLERP(t=t).update(deltas, Context("w", base)) + base, expected.reshape(SHAPE))


def test_slerp_stays_on_the_sphere_and_is_straight_where_vectors_are_nearly_parallel(draw):
    a, b = torch.nn.functional.normalize(vectors(draw, 2))
    assert abs(float(slerp(a, b, 0.3).norm()) - 1) < 1e-12
    near = a + 1e-3 * b
    torch.testing.assert_close(slerp(a, near, 0.3), 0.7 * a + 0.3 * near, rtol=0, atol=0)
    torch.testing.assert_close(slerp(a, -2 * a, 0.5), -0.5 * a)  # opposite: straight through zero
    assert torch.isfinite(slerp(torch.zeros_like(a), b, 0.5)).all()


def test_slerp_takes_two_experts():
    base, experts = make_models(3)
    with pytest.raises(MergeError, match="SLERP merges at most 2 experts, and 3 are given"):
        merge(base, experts, SLERP())
    with pytest.raises(ValueError, match=r"SLERP: t must lie in \[0, 1\]"):
        SLERP(t=1.5)
    assert not SLERP().order_matters
    assert SLERP(t=0.4).order_matters


# Multi-SLERP


def multi_slerp_by_hand(x, w, eps=1e-8):
    """The published procedure, with its detour through the tangent space."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / (norms + eps)
    mean = (unit * w[:, None]).sum(0)
    mean /= np.linalg.norm(mean)
    tangent = unit - (unit * mean).sum(1, keepdims=True) * mean
    step = (tangent * w[:, None]).sum(0)
    length = np.linalg.norm(step) + eps
    return (mean * np.cos(length) + step * np.sin(length) / length) * float((norms[:, 0] * w).sum())


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 5.0)])
def test_multi_slerp_states_the_procedure(draw, weights):
    x = vectors(draw)
    w = np.array(weights or [1.0, 1.0, 1.0])
    expected = torch.from_numpy(multi_slerp_by_hand(x.numpy(), w / w.sum()))
    torch.testing.assert_close(multi_slerp(x, torch.from_numpy(w / w.sum())), expected)
    base = torch.randn(SHAPE, generator=draw, dtype=torch.float64)
    deltas = x.reshape(3, *SHAPE)
    found = MultiSLERP(weights=weights).update(deltas - base, Context("w", base)) + base
    torch.testing.assert_close(found, expected.reshape(SHAPE))
    found = MultiSLERP(weights=weights, origin="base").update(deltas, Context("w", base))
    torch.testing.assert_close(found, expected.reshape(SHAPE))


def test_multi_slerp_of_two_is_the_middle_of_the_arc(draw):
    x = torch.nn.functional.normalize(vectors(draw, 2))
    torch.testing.assert_close(multi_slerp(x, torch.tensor([0.5, 0.5]).double()), slerp(*x, 0.5))


def test_multi_slerp_averages_what_cancels(draw):
    a, b = vectors(draw, 2)
    x = torch.stack([a, -3 * a, b, -b])
    torch.testing.assert_close(multi_slerp(x, torch.full((4,), 0.25).double()), -0.5 * a)


def test_multi_slerp_refuses_bad_weights():
    with pytest.raises(ValueError, match=r"MultiSLERP: weights must lie in \[0, inf\)"):
        MultiSLERP(weights=(1.0, -1.0))
    with pytest.raises(ValueError, match="MultiSLERP: origin must be one of zero, base"):
        MultiSLERP(origin="mean")
    base, experts = make_models(3)
    with pytest.raises(MergeError, match="MultiSLERP has 2 weights for 3 experts; give one for each"):
        merge(base, experts, MultiSLERP(weights=[0.5, 0.5]))


# Karcher


def test_karcher_mean_is_where_the_ways_to_all_directions_cancel(draw):
    x = vectors(draw, 5) + 1
    norms = x.norm(dim=1, keepdim=True)
    mean = karcher_mean(x, max_iter=100, tol=1e-12) / norms.mean()
    assert abs(float(mean.norm()) - 1) < 1e-12
    assert logarithm(mean, x / norms, 1e-12).mean(dim=0).norm() < 1e-10
    # and so a minimum of the sum of squared angles
    cost = lambda point: float(torch.arccos((x / norms) @ (point / point.norm())).square().sum())  # noqa: E731
    assert all(cost(mean) < cost(mean + 1e-3 * torch.randn(20, generator=draw)) for _ in range(20))
    assert cost(mean) < cost(x.mean(dim=0))


def test_karcher_mean_of_two_is_the_middle_of_the_arc(draw):
    a, b = vectors(draw, 2) + 1
    found = karcher_mean(torch.stack([a, b]))
    middle = slerp(a / a.norm(), b / b.norm(), 0.5)
    torch.testing.assert_close(found, (a.norm() + b.norm()) / 2 * middle)


def test_karcher_counts_vectors_without_direction_in_the_length_only(draw):
    a, b = vectors(draw, 2) + 1
    three = karcher_mean(torch.stack([a, b, torch.zeros_like(a)]))
    torch.testing.assert_close(three, karcher_mean(torch.stack([a, b])) * 2 / 3)
    assert not karcher_mean(torch.zeros(3, 4)).any()
    assert torch.isfinite(karcher_mean(torch.stack([a, -a]))).all()


def test_karcher_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"Karcher: max_iter must lie in \[1, inf\]"):
        Karcher(max_iter=0)
    with pytest.raises(ValueError, match=r"Karcher: tol must lie in \(0, 1\]"):
        Karcher(tol=0.0)


@pytest.mark.parametrize("method", [SLERP(t=0.2), MultiSLERP(), Karcher(), ModelStock(), Soup()], ids=repr)
def test_one_expert_stays_itself(method):
    base, experts = make_models(1)
    merged = merge(base, experts, method).weights
    for name, tensor in experts["expert 0"].items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-7)


# Soups


def test_the_uniform_soup_is_the_mean():
    base, experts = make_models(3)
    merged, expected = merge(base, experts, Soup()).weights, merge(base, experts, WeightAverage()).weights
    assert all(torch.equal(merged[name], expected[name]) for name in base)


def distance_score(target, experts):
    """Larger where the mean of the experts' first entries is nearer to the target."""

    def score(weights):
        return -abs(float(weights["w"][0]) - target)

    return score, {name: {"w": torch.tensor([value, 0.0])} for name, value in experts.items()}


def test_greedy_soup_keeps_what_does_not_hurt():
    base = {"w": torch.zeros(2)}
    # From best to worst: a (0.9), b (1.2), c (3.0). a + b = 1.05 is better than a; with c it is 1.7, worse.
    score, experts = distance_score(1.0, {"c": 3.0, "b": 1.2, "a": 0.9})
    calls = []
    merged = greedy_soup(base, experts, lambda weights: calls.append(1) or score(weights))
    assert set(merged.experts) == {"a", "b"}
    torch.testing.assert_close(merged.weights["w"], torch.tensor([1.05, 0.0]))
    assert len(calls) == 3 + 2


def test_greedy_soup_is_never_worse_than_the_best_expert_and_takes_equals(tmp_path):
    base = {"w": torch.zeros(2)}
    score, experts = distance_score(1.0, {"a": 1.0, "b": 4.0, "c": -3.0})
    merged = greedy_soup(base, experts, score, output=tmp_path / "soup.safetensors")
    assert list(merged.experts) == ["a"]
    assert (tmp_path / "soup.safetensors").is_file()
    assert set(greedy_soup(base, experts, lambda weights: 0.0).experts) == {"a", "b", "c"}


# DOGE


def doge_by_hand(matrices, eta=0.07, subspace=6, density=0.3, iterations=400, lr=1e-4):
    """The authors' procedure with autograd: ``{name: (T, m, n)} -> {name: (m, n)}``."""
    T = len(next(iter(matrices.values())))
    flat = torch.cat([x.flatten(1) for x in matrices.values()], dim=1)
    d = flat.shape[1]
    threshold = flat.abs().kthvalue(d - int(d * density), dim=1).values
    found = {}
    for name, x in matrices.items():
        lamda = eta / x.flatten(1).norm(dim=1)
        r = min(x.shape[1:])
        U = torch.cat([torch.linalg.svd(v, full_matrices=False)[0][:, : r // T] for v in x], dim=1)
        top = torch.linalg.svd(U, full_matrices=False)[0][:, : r // subspace]
        delta = torch.nn.Parameter(torch.zeros_like(x[0]))
        adam = torch.optim.Adam([delta], lr=lr)
        for _ in range(iterations):
            merged = (lamda.view(-1, 1, 1) * (x + delta)).sum(dim=0)
            loss = sum((v * (v - merged)).sum(dim=1).pow(2).sum() for v in x)
            (gradient,) = torch.autograd.grad(loss, delta)
            delta.grad = gradient - top @ top.T @ gradient
            adam.step()
        kept = x.abs() >= threshold.view(-1, 1, 1)
        found[name] = (lamda.view(-1, 1, 1) * (x + delta.detach()) * kept).sum(dim=0)
    return found


def test_doge_states_the_procedure(draw):
    shapes = {"a.weight": (24, 12), "b.weight": (12, 18)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} | {"a.bias": torch.zeros(24)}
    experts = {
        str(i): {name: w + 0.1 * torch.randn(w.shape, generator=draw) for name, w in base.items()} for i in range(3)
    }
    deltas = {n: torch.stack([e[n] - base[n] for e in experts.values()]).double() for n in shapes}
    expected = doge_by_hand(deltas, iterations=60, lr=1e-3)
    merged = merge(base, experts, DOGE(iterations=60, lr=1e-3)).weights
    plain = doge_by_hand(deltas, iterations=0)
    for name in shapes:
        torch.testing.assert_close(merged[name] - base[name], expected[name].float(), rtol=0, atol=1e-6)
        assert (expected[name] - plain[name]).abs().max() > 1e-4  # the optimisation is seen
    assert torch.equal(merged["a.bias"], base["a.bias"])


def test_doge_shares_no_more_dimensions_than_there_are(draw):
    basis = shared_subspace(torch.randn(3, 24, 12, generator=draw, dtype=torch.float64), 6)
    assert basis.shape == (24, 2)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(2, dtype=torch.float64))
    assert shared_subspace(torch.randn(5, 4, 3, generator=draw), 1).shape == (4, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": 0.0}, r"DOGE: eta must lie in \(0, inf\]"),
        ({"subspace": 0}, r"DOGE: subspace must lie in \[1, inf\]"),
        ({"density": 0.0}, r"DOGE: density must lie in \(0, 1\]"),
        ({"iterations": -1}, r"DOGE: iterations must lie in \[0, inf\]"),
        ({"lr": 0.0}, r"DOGE: lr must lie in \(0, inf\]"),
    ],
)
def test_doge_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DOGE(**arguments)
