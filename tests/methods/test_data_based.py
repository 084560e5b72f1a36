"""Methods that weigh experts by statistics of their data: Fisher, RegMean, MaTS."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.merging.merge import merge
from lightning_merge.merging.toy_models import make_models, make_statistics
from lightning_merge.methods import Context
from lightning_merge.methods.fisher import Fisher, fisher_average
from lightning_merge.methods.mats import MaTS, conjugate_gradients
from lightning_merge.methods.regmean import RegMean, reduce_off_diagonal, regmean
from lightning_merge.utilities.errors import MergeError

T, M, N = 3, 7, 5


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(3)


def random(draw, *shape):
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def grams_of(draw, side, rows=40):
    x = random(draw, T, rows, side)
    return x.mT @ x / rows


def context(base, **statistics):
    return Context("w", base, statistics=statistics)


# Fisher


def test_fisher_is_the_mode_of_the_product_of_gaussians(draw):
    deltas, fishers = random(draw, T, M, N), random(draw, T, M, N).abs()
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    merged = fisher_average(deltas, fishers, weights).requires_grad_()
    loss = (weights.view(-1, 1, 1) * fishers * (merged - deltas).square()).sum()
    (gradient,) = torch.autograd.grad(loss, merged)
    assert gradient.abs().max() < 1e-12


def test_fisher_of_equal_information_is_the_mean_and_so_is_none_at_all(draw):
    deltas = random(draw, T, M, N)
    for fishers in (torch.ones_like(deltas), torch.zeros_like(deltas)):
        found = Fisher(smooth=0.0).update(deltas, context(None, fisher=fishers))
        torch.testing.assert_close(found, deltas.mean(dim=0))


def test_fisher_of_one_expert_alone_takes_that_expert(draw):
    deltas, fishers = random(draw, T, M, N), torch.zeros(T, M, N, dtype=torch.float64)
    fishers[1] = 1e-3
    torch.testing.assert_close(Fisher(smooth=0.0).update(deltas, context(None, fisher=fishers)), deltas[1])


def test_fisher_with_a_target_model_lets_it_decide_where_nobody_knows(draw):
    deltas, fishers = random(draw, T, M, N), torch.zeros(T, M, N, dtype=torch.float64)
    matena = Fisher(smooth=0.0, floor=1e-6, favor_target_model=True)
    torch.testing.assert_close(matena.update(deltas, context(None, fisher=fishers)), deltas[0])
    evenly = Fisher(smooth=0.0, floor=1e-6).update(deltas, context(None, fisher=fishers))
    torch.testing.assert_close(evenly, deltas.mean(dim=0))
    assert matena.order_matters
    assert not Fisher().order_matters


@pytest.mark.parametrize("normalize", ["param", "model"])
def test_fisher_normalised_does_not_depend_on_the_unit_of_an_experts_fisher(normalize):
    base, experts = make_models()
    statistics = make_statistics(base, experts)
    method = Fisher(smooth=0.0, normalize=normalize)
    found = merge(base, experts, method, statistics=statistics).weights
    larger = {
        name: {k: v * 1000 if name == "expert 1" else v for k, v in source.items()}
        for name, source in statistics.items()
    }
    again = merge(base, experts, method, statistics=larger).weights
    plain = merge(base, experts, Fisher(smooth=0.0), statistics=larger).weights
    for name in found:
        torch.testing.assert_close(found[name], again[name], rtol=1e-5, atol=1e-6)
    assert (plain["text_projection"] - found["text_projection"]).abs().max() > 1e-3


def test_fisher_takes_weights(draw):
    base, experts = make_models()
    statistics = make_statistics(base, experts)
    only_last = merge(base, experts, Fisher(weights=[0, 0, 2]), statistics=statistics).weights
    torch.testing.assert_close(only_last["visual.proj"], experts["expert 2"]["visual.proj"])
    with pytest.raises(MergeError, match="Fisher has 2 weights for 3 experts"):
        merge(base, experts, Fisher(weights=(1, 1)), statistics=statistics)


# RegMean


def test_regmean_minimises_the_distance_to_every_experts_outputs(draw):
    inputs, deltas = random(draw, T, 40, N), random(draw, T, M, N)
    merged = regmean(deltas, inputs.mT @ inputs).requires_grad_()
    loss = (inputs @ merged.mT - inputs @ deltas.mT).square().sum()
    (gradient,) = torch.autograd.grad(loss, merged)
    assert gradient.abs().max() < 1e-10


def test_regmean_is_exact_where_experts_see_different_features(draw):
    # Each expert's inputs live in features of their own, so that the merged layer does for each what the expert does.
    deltas, grams = random(draw, 2, M, 4), torch.zeros(2, 4, 4, dtype=torch.float64)
    grams[0, :2, :2], grams[1, 2:, 2:] = torch.eye(2), 3 * torch.eye(2)
    merged = regmean(deltas, grams)
    torch.testing.assert_close(merged, torch.cat([deltas[0, :, :2], deltas[1, :, 2:]], dim=1))


def test_regmean_averages_what_no_input_reaches(draw):
    deltas, grams = random(draw, T, M, N), grams_of(draw, N)
    grams[:, 0], grams[:, :, 0] = 0, 0  # a feature that is always zero
    merged = regmean(deltas, grams)
    torch.testing.assert_close(merged[:, 0], deltas[:, :, 0].mean(dim=0))
    torch.testing.assert_close(merged[:, 1:], regmean(deltas[:, :, 1:], grams[:, 1:, 1:]))
    torch.testing.assert_close(regmean(deltas, torch.zeros_like(grams)), deltas.mean(dim=0))


def test_regmean_states_the_formula_on_the_weights(draw):
    base, deltas, grams = random(draw, M, N), random(draw, T, M, N), grams_of(draw, N)
    reduced = 0.9 * grams + 0.1 * torch.stack([torch.diag(gram.diagonal()) for gram in grams])
    torch.testing.assert_close(reduce_off_diagonal(grams, 0.9), reduced)
    weights = base + deltas
    expected = (torch.linalg.inv(reduced.sum(dim=0)) @ (reduced @ weights.mT).sum(dim=0)).mT
    found = RegMean().update(deltas, context(base, gram=grams)) + base
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [RegMean(), MaTS(iterations=5)], ids=["RegMean", "MaTS"])
def test_kernels_are_merged_as_matrices_and_the_rest_is_averaged(draw, method):
    kernels, base = random(draw, T, M, N, 2, 2), random(draw, M, N, 2, 2)
    statistics = {"gram": grams_of(draw, 4 * N), "gram_out": grams_of(draw, M)}
    found = method.update(kernels, context(base, **statistics))
    expected = method.update(kernels.flatten(2), context(base.flatten(1), **statistics))
    torch.testing.assert_close(found, expected.reshape(M, N, 2, 2))
    torch.testing.assert_close(method.update(kernels, context(base)), kernels.mean(dim=0))


# MaTS


def test_mats_without_gradients_is_regmean(draw):
    base, deltas, grams = random(draw, M, N), random(draw, T, M, N), grams_of(draw, N)
    found = MaTS(backward=False, rtol=1e-13).update(deltas, context(base, gram=grams))
    torch.testing.assert_close(found, regmean(deltas, grams), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("initialization", ["task_arithmetic", "average", "pretrained"])
def test_mats_solves_the_system_from_any_start(draw, initialization):
    base, deltas, grams, outer = random(draw, M, N), random(draw, T, M, N), grams_of(draw, N), grams_of(draw, M)
    method = MaTS(iterations=500, rtol=1e-13, initialization=initialization)
    found = method.update(deltas, context(base, gram=grams, gram_out=outer))
    system = sum(torch.kron(h, g) for h, g in zip(outer, grams, strict=True))  # of row-major vec(W)
    right = sum(torch.kron(h, g) @ d.flatten() for h, g, d in zip(outer, grams, deltas, strict=True))
    torch.testing.assert_close(found, torch.linalg.solve(system, right).reshape(M, N), rtol=1e-9, atol=1e-9)


def test_mats_starts_where_it_is_told(draw):
    base, deltas, grams, outer = random(draw, M, N), random(draw, T, M, N), grams_of(draw, N), grams_of(draw, M)
    starts = {"task_arithmetic": 0.3 * deltas.sum(dim=0), "average": deltas.mean(dim=0), "pretrained": 0 * deltas[0]}
    for initialization, start in starts.items():
        method = MaTS(rtol=1e9, initialization=initialization)  # nothing to do
        torch.testing.assert_close(method.update(deltas, context(base, gram=grams, gram_out=outer)), start)


def test_mats_keeps_its_start_where_the_data_say_nothing(draw):
    base, deltas = random(draw, M, N), random(draw, T, M, N)
    nothing = {"gram": torch.zeros(T, N, N).double(), "gram_out": torch.zeros(T, M, M).double()}
    found = MaTS(initialization="average").update(deltas, context(base, **nothing))
    torch.testing.assert_close(found, deltas.mean(dim=0))


def test_conjugate_gradients_need_as_many_steps_as_there_are_eigenvalues(draw):
    q = torch.linalg.qr(random(draw, 6, 6))[0]
    matrix = q @ torch.diag(torch.tensor([1.0, 1, 1, 5, 5, 9]).double()) @ q.mT
    right, start = random(draw, 6, 1), random(draw, 6, 1)
    exact = torch.linalg.solve(matrix, right)
    solve = lambda steps: conjugate_gradients(lambda x: matrix @ x, start, right - matrix @ start, steps, 0.0)  # noqa: E731
    assert (solve(2) - exact).abs().max() > 1e-3
    torch.testing.assert_close(solve(3), exact, rtol=1e-10, atol=1e-10)


CONVERGED = {"rtol": 1e-9, "iterations": 200}


@pytest.mark.parametrize(
    "method", [Fisher(), RegMean(), MaTS(**CONVERGED), MaTS(**CONVERGED, backward=False)], ids=repr
)
def test_one_expert_stays_itself(method):
    base, experts = make_models(1)
    merged = merge(base, experts, method, statistics=make_statistics(base, experts)).weights
    for name, tensor in experts["expert 0"].items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Fisher, {"smooth": -1.0}, r"Fisher: smooth must lie in \[0, inf\]"),
        (Fisher, {"floor": -1.0}, r"Fisher: floor must lie in \[0, inf\]"),
        (Fisher, {"normalize": "layer"}, r"Fisher: normalize must be one of none, param, model"),
        (Fisher, {"weights": (0, 0)}, r"Fisher: weights must lie in \[0, inf\) and not all be zero"),
        (RegMean, {"reduce_off_diagonal": 1.1}, r"RegMean: reduce_off_diagonal must lie in \[0, 1\]"),
        (MaTS, {"iterations": 0}, r"MaTS: iterations must lie in \[1, inf\]"),
        (MaTS, {"initialization": "mean"}, r"MaTS: initialization must be one of task_arithmetic, average, pretrained"),
        (MaTS, {"reduce_off_diagonal": -0.1}, r"MaTS: reduce_off_diagonal must lie in \[0, 1\]"),
        (MaTS, {"rtol": -1.0}, r"MaTS: rtol must lie in \[0, inf\]"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
