"""Weight matching against the official code, and planted permutations."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from lightning_merge.align import Permutation, distance, find_symmetries, match_weights, similarity
from lightning_merge.align.descent import Descent
from lightning_merge.utilities.errors import MergeError
from tests.align.models import ATTENTION, GROUPED_QUERY_ATTENTION, draw, golden, mlp, part, same
from tests.toys import TINY_CONVNEXT

PLANTED = ["grb_planted_noise0.0", "grb_planted_noise0.02", "grb_planted_noise0.05"]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("restarts", [1, 3])
def test_what_the_official_code_recovers_with_and_without_noise(name, restarts):
    facts, tensors = golden(name)
    a, b = part(tensors, "A."), part(tensors, "B.")
    symmetries = mlp(a)
    found = match_weights(a, b, symmetries, restarts=restarts)
    back = Permutation(symmetries, part(tensors, "planted.")).inverse()
    for group, order in found.orders.items():
        assert torch.equal(order, tensors[f"found.{group}"])
        assert torch.equal(order, back.orders[group]) == facts["recovered_inverse"][group]
    assert distance(a, b, symmetries) == pytest.approx(facts["l2_before"], abs=1e-5)
    assert distance(a, found.apply(b), symmetries) == pytest.approx(facts["l2_after"], abs=1e-5)


@pytest.mark.parametrize("name", [*PLANTED, "grb_digits_mlp"])
def test_the_descent_is_the_official_one_in_the_official_order_of_visits(name):
    facts, tensors = golden(name)
    a = part(tensors, "A.")
    descent = Descent(a, part(tensors, "B."), Permutation.identity(mlp(a)))
    progress = [[descent.visit(facts["perm_names"][i]) for i in sweep] for sweep in tensors["visit_order"].tolist()]
    assert [any(sweep) for sweep in progress] == [True] * (len(progress) - 1) + [False]
    for group, order in descent.permutation.orders.items():
        assert torch.equal(order, tensors[f"found.{group}"])


def test_two_digit_classifiers_end_as_close_as_in_the_official_code():
    facts, tensors = golden("grb_digits_mlp")
    a, b, x, y = part(tensors, "A."), part(tensors, "B."), tensors["x_test"], tensors["y_test"]
    symmetries = mlp(a)

    def outputs(weights):
        h = x.double().flatten(1)
        for i in range(4):
            weight, bias = (weights[f"layer{i}.{kind}"].double() for kind in ("weight", "bias"))
            h = F.linear(h.relu() if i else h, weight, bias)
        return h

    def curve(other):
        return [
            float(F.cross_entropy(outputs({n: torch.lerp(a[n], other[n], i / 10) for n in a}), y)) for i in range(11)
        ]

    def barrier(losses):
        return max(loss - (1 - i / 10) * losses[0] - i / 10 * losses[-1] for i, loss in enumerate(losses))

    assert barrier(curve(b)) == pytest.approx(facts["barrier_naive"], abs=1e-5)
    aligned = match_weights(a, b, symmetries).apply(b)
    official = Permutation(symmetries, part(tensors, "found.")).apply(b)
    assert barrier(curve(official)) == pytest.approx(facts["barrier_aligned"], abs=1e-5)
    assert similarity(a, aligned, symmetries) >= similarity(a, official, symmetries)
    assert barrier(curve(aligned)) < 1.2 * facts["barrier_aligned"]
    middle = outputs({name: (a[name] + aligned[name]) / 2 for name in a}).argmax(1)
    assert float((middle == y).float().mean()) > facts["acc_mid_aligned"] - 0.02
    torch.testing.assert_close(outputs(aligned), outputs(b))


@pytest.mark.parametrize("symmetries", [ATTENTION, GROUPED_QUERY_ATTENTION], ids=["attention", "grouped queries"])
@pytest.mark.parametrize("seed", range(5))
def test_planted_heads_and_channels_within_them_are_recovered(symmetries, seed):
    model = draw(symmetries, seed)
    planted = Permutation.random(symmetries, seed).apply(model)
    assert same(match_weights(model, planted, symmetries, seed=seed).apply(planted), model)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet26", {"channels": (8, 16, 16, 24), "layers": (1, 1, 1, 1), "stem_width": 8}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}),
        ("convnext_atto", {**TINY_CONVNEXT, "in_chans": 3}),
    ],
)
def test_planted_permutations_of_timm_models_are_recovered(name, settings):
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=5, **settings).eval()
    weights = {
        key: tensor + 0.1 * torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for key, tensor in module.state_dict().items()
    }
    symmetries = find_symmetries(module, (torch.randn(2, 3, 32, 32),))
    planted = Permutation.random(symmetries, 1).apply(weights)
    assert not same(planted, weights)
    assert same(match_weights(weights, planted, symmetries).apply(planted), weights)


def test_no_visit_lowers_the_similarity_and_the_kept_scores_are_exact():
    a, b = draw(GROUPED_QUERY_ATTENTION, 0), draw(GROUPED_QUERY_ATTENTION, 1)
    descent = Descent(a, b, Permutation.random(GROUPED_QUERY_ATTENTION, 2))
    reached, generator, gained = descent.similarity, torch.Generator().manual_seed(0), 0
    for _ in range(20):
        descent.visit(["heads", "stream"][int(torch.randint(2, (), generator=generator))])
        assert descent.similarity >= reached
        gained += descent.similarity > reached
        reached = descent.similarity
        exact = similarity(a, descent.permutation.apply(b), GROUPED_QUERY_ATTENTION)
        assert reached == pytest.approx(exact, rel=1e-12)
    assert gained >= 2
    descent.run(generator, 100)
    again = Descent(a, b, descent.permutation)  # without anything kept
    assert not any([again.visit(family) for family in ("heads", "stream")])


def test_more_restarts_are_never_worse_and_a_seed_says_all():
    a, b = draw(GROUPED_QUERY_ATTENTION, 0), draw(GROUPED_QUERY_ATTENTION, 1)
    reached = [
        similarity(a, match_weights(a, b, GROUPED_QUERY_ATTENTION, restarts=n).apply(b), GROUPED_QUERY_ATTENTION)
        for n in (1, 2, 6, 6)
    ]
    assert reached[0] <= reached[1] <= reached[2] == reached[3]


def test_statistics_are_permuted_and_not_compared():
    axes = {"weight": ("P", None), "running_mean": ("P",)}
    weights = {"weight": torch.randn(6, 3), "running_mean": 100 * torch.randn(6)}
    symmetries = type(ATTENTION).from_axes(axes, {n: t.shape for n, t in weights.items()}, ["running_mean"])
    other = Permutation.random(symmetries, 1).apply(weights)
    other["running_mean"] = -other["running_mean"]
    found = match_weights(weights, other, symmetries).apply(other)
    assert torch.equal(found["running_mean"], -weights["running_mean"])
    assert distance(weights, found, symmetries) == 0


def test_refusals():
    model = draw(ATTENTION, 0)
    broken = {**model, "key": model["key"] / 0}
    with pytest.raises(MergeError, match="'key' of the other model holds values that are not finite"):
        match_weights(model, broken, ATTENTION)
    with pytest.raises(MergeError, match=r"'head' has shape \(3, 15\) in the reference"):
        match_weights({**model, "head": model["head"][:, 1:]}, model, ATTENTION)
    with pytest.raises(MergeError, match="restarts=0 must be at least 1"):
        match_weights(model, model, ATTENTION, restarts=0)
