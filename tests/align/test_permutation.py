"""Elements of a permutation group."""

from __future__ import annotations

import pytest
import torch

from lightning_merge.align import Fixed, Free, Group, Permutation, Product, Sum, Symmetries
from lightning_merge.utilities.errors import MergeError

HEADS = Symmetries(
    groups={"heads": Group("heads", 3), "inner": Group("inner", 4, within="heads"), "mlp": Group("mlp", 5)},
    axes={
        "query": (Product((Free("heads", 3), Free("inner", 4))), Fixed(2)),
        "both": (Sum((Free("mlp", 5), Product((Free("heads", 3), Fixed(2), Free("inner", 4))))),),
    },
)
WEIGHTS = {"query": torch.randn(12, 2), "both": torch.randn(29), "other": torch.randn(3)}


def test_an_entry_goes_where_its_coordinates_go():
    permutation = Permutation.random(HEADS, seed=1)
    heads, inner, mlp = (permutation.orders[name] for name in ("heads", "inner", "mlp"))
    found = permutation.apply(WEIGHTS)
    old, new = WEIGHTS["query"].reshape(3, 4, 2), found["query"].reshape(3, 4, 2)
    for h in range(3):
        for d in range(4):
            assert torch.equal(new[h, d], old[heads[h], inner[h, d]])
    old, new = WEIGHTS["both"][5:].reshape(3, 2, 4), found["both"][5:].reshape(3, 2, 4)
    assert torch.equal(found["both"][:5], WEIGHTS["both"][:5][mlp])
    for h in range(3):
        assert torch.equal(new[h], old[heads[h]][:, inner[h]])
    assert found["other"] is WEIGHTS["other"]


@pytest.mark.parametrize("seed", range(5))
def test_the_group_laws(seed):
    first, second = Permutation.random(HEADS, seed), Permutation.random(HEADS, seed + 100)
    for permutation, expected in (
        (first.then(first.inverse()), WEIGHTS),
        (first.inverse().then(first), WEIGHTS),
        (first.then(second), second.apply(first.apply(WEIGHTS))),
        (Permutation.identity(HEADS), WEIGHTS),
    ):
        for name, tensor in permutation.apply(WEIGHTS).items():
            assert torch.equal(tensor, expected[name])
    assert first.moved() > 0
    assert Permutation.identity(HEADS).moved() == 0


def test_json_round_trip_and_what_is_no_specification():
    assert Symmetries.from_json(HEADS.to_json()) == HEADS
    groups = '{"groups": {"g": {"size": 2, "within": "h"}}, "axes": {}}'
    deep = '{"groups": {}, "axes": {"w": [' + '{"sum": [' * 300 + "]}" * 300 + "]}}"
    for text in ("[]", "{", '{"groups": {}}', '{"groups": {}, "axes": {"w": [{"group": "g"}]}}', groups, deep):
        with pytest.raises(MergeError, match="no specification of permutation groups"):
            Symmetries.from_json(text)


def test_models_that_do_not_fit_are_refused_with_every_reason():
    with pytest.raises(MergeError, match=r"(?s)lacks 'query'.*'both' has shape \(28,\) in the model and \(29,\)"):
        Permutation.identity(HEADS).apply({"both": torch.randn(28)})
    with pytest.raises(MergeError, match=r"(?s)'b', which has 2 axes, not 1.*'P' has 3 channels, but 4 in 'c'"):
        Symmetries.from_axes({"a": ["P"], "b": ["P"], "c": ["P"]}, {"a": (3,), "b": (3, 2), "c": (4,)})


def test_a_head_may_have_other_classes_but_not_other_inputs():
    symmetries = Symmetries.from_axes({"body": ["P", None], "head": [None, "P"]}, {"body": (4, 3), "head": (10, 4)})
    permutation = Permutation.random(symmetries, 0)
    weights = {"body": torch.randn(4, 3), "head": torch.randn(2, 4)}
    found = permutation.apply(weights)
    assert torch.allclose(found["head"] @ found["body"], weights["head"] @ weights["body"])
    with pytest.raises(MergeError, match="only models of one architecture can be aligned"):
        permutation.apply(weights | {"head": torch.randn(10, 5)})


def test_what_is_ignored_is_permuted_but_not_compared():
    symmetries = Symmetries.from_axes({"a": ["P"], "head.weight": [None, "P"]}, {"a": (4,), "head.weight": (2, 4)})
    assert symmetries.ignoring(["head.*"]).occurrences("P") == [("a", 0)]
    assert symmetries.occurrences("P") == [("a", 0), ("head.weight", 1)]
    assert symmetries.ignoring(["head.*"]).axes == symmetries.axes
