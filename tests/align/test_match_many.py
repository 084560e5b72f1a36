"""Several models in one common order."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.align import Permutation, match_many, match_weights, similarity
from lightning_merge.align.frank_wolfe import _Space
from lightning_merge.align.match_many import pair_similarity
from lightning_merge.utilities.errors import MergeError
from tests.align.models import ATTENTION, GROUPED_QUERY_ATTENTION, draw, golden, mlp, part, same, same_orders

METHODS = ["frank_wolfe", "mean", "reference"]


@pytest.mark.parametrize("method", METHODS)
def test_three_models_are_in_the_order_of_the_official_code(method):
    facts, tensors = golden("c2m3_sync")
    models = {name: part(tensors, f"{name}.") for name in "abc"}
    symmetries = mlp(models["a"])
    found = match_many(models, symmetries, method=method)
    official = {name: Permutation(symmetries, part(tensors, f"perm.{name}.")).inverse() for name in "abc"}
    for name in "bc":
        assert same_orders(found[name], Permutation(symmetries, part(tensors, f"planted.{name}.")).inverse())
        assert same_orders(found[name], official[name].then(official["a"].inverse()))
    reached = pair_similarity([found[name].apply(models[name]) for name in "abc"], symmetries)
    assert reached == pytest.approx(facts["obj"][-1], abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetries", [ATTENTION, GROUPED_QUERY_ATTENTION], ids=["attention", "grouped queries"])
def test_planted_heads_of_noisy_models_and_no_error_around_a_circle(method, symmetries):
    base = draw(symmetries, 0)
    noise = [draw(symmetries, seed) for seed in (1, 2, 3)]
    planted = [Permutation.random(symmetries, seed) for seed in (4, 5, 6)]
    models = [
        permutation.apply({name: base[name] + 0.1 * own[name] for name in base})
        for permutation, own in zip(planted, noise, strict=True)
    ]
    found = match_many(models, symmetries, method=method)
    assert list(found) == [0, 1, 2]
    for i in range(3):
        assert same_orders(planted[i].then(found[i]), planted[0].then(found[0]))
    circle = Permutation.identity(symmetries)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        circle = circle.then(found[i].then(found[j].inverse()))
    assert circle.moved() == 0
    assert found[0].moved() == 0


@pytest.mark.parametrize("method", METHODS)
def test_two_models_are_matched_as_by_weight_matching(method):
    model = draw(ATTENTION, 0)
    planted = Permutation.random(ATTENTION, 1).apply(model)
    found = match_many({"a": model, "b": planted}, ATTENTION, method=method)
    assert same_orders(found["b"], match_weights(model, planted, ATTENTION))
    assert same(found["b"].apply(planted), model)


def test_the_mean_never_loses_what_the_reference_has():
    models = [draw(ATTENTION, seed) for seed in range(3)]
    reached = {}
    for method in METHODS:
        found = match_many(models, ATTENTION, method=method)
        reached[method] = pair_similarity([found[i].apply(model) for i, model in enumerate(models)], ATTENTION)
    assert reached["mean"] > reached["reference"]
    assert reached["frank_wolfe"] > reached["reference"]
    pairs = sum(similarity(models[i], models[j], ATTENTION) for i in range(3) for j in range(i))
    assert pair_similarity(models, ATTENTION) == pytest.approx(pairs)


def test_the_gradients_of_the_mixtures_are_those_of_autograd():
    models = [draw(GROUPED_QUERY_ATTENTION, seed) for seed in range(2)]
    space = _Space(models, GROUPED_QUERY_ATTENTION)
    start = [space.mixtures(Permutation.random(GROUPED_QUERY_ATTENTION, seed).orders) for seed in (3, 4)]
    mixtures = [{key: (matrix + 0.1).requires_grad_() for key, matrix in own.items()} for own in start]
    total = 0.0
    for name in GROUPED_QUERY_ATTENTION.axes:
        mixed = [space._mixed(model[name].double(), name, own) for model, own in zip(models, mixtures, strict=True)]
        total = total + (mixed[0] * mixed[1]).sum()
    total.backward()
    found = space.gradients([{key: matrix.detach() for key, matrix in own.items()} for own in mixtures])
    for own, gradients in zip(mixtures, found, strict=True):
        for key, matrix in own.items():
            torch.testing.assert_close(gradients[key], matrix.grad)


def test_refusals():
    model = draw(ATTENTION, 0)
    with pytest.raises(MergeError, match="There are 1 models to match; give at least two"):
        match_many([model], ATTENTION)
    with pytest.raises(MergeError, match="method='sum' must be one of frank_wolfe, mean, reference"):
        match_many([model, model], ATTENTION, method="sum")
    with pytest.raises(MergeError, match="lacks 'key'"):
        match_many({"a": model, "b": {name: t for name, t in model.items() if name != "key"}}, ATTENTION)
