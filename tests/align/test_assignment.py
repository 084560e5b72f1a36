"""Assignments within assignments, against trying everything."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch

from lightning_merge.align.assignment import assign_family
from lightning_merge.align.entries import Family
from tests.align.models import golden


def test_heads_and_what_is_within_them_against_trying_everything():
    family = Family("h", 3, {"a": 2, "b": 3})
    torch.manual_seed(0)
    scores = {key: torch.randn(n, n).double() for key, n in ((("h",), 3), (("h", "a"), 6), (("h", "b"), 9))}
    found = assign_family(family, scores)

    def value(heads, inner):  # inner[group][i] is the order within head i
        total = sum(scores["h",][i, j] for i, j in enumerate(heads))
        for group, n in family.inner.items():
            for i, j in enumerate(heads):
                total += sum(scores["h", group][i * n + d, j * n + e] for d, e in enumerate(inner[group][i]))
        return float(total)

    def all_inner(n):
        return list(product(list(permutations(range(n))), repeat=3))

    best = max(
        max(value(heads, {"a": a, "b": ((0, 1, 2),) * 3}) for a in all_inner(2))
        + max(value(heads, {"a": ((0, 1),) * 3, "b": b}) for b in all_inner(3))
        - value(heads, {"a": ((0, 1),) * 3, "b": ((0, 1, 2),) * 3})
        for heads in permutations(range(3))
    )
    reached = value(found["h"].tolist(), {group: found[group].tolist() for group in family.inner})
    assert reached == pytest.approx(best, abs=1e-12)


def test_given_orders_stay_and_the_rest_fits_them():
    family = Family("h", 3, {"a": 4})
    truth = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    heads = torch.tensor([2, 0, 1])
    scores = torch.zeros(3, 4, 3, 4)
    for i in range(3):
        scores[i, torch.arange(4), heads[i], truth[i]] = 1.0
    found = assign_family(family, {("h", "a"): scores.reshape(12, 12).double()}, {"h": heads})
    assert torch.equal(found["h"], heads)
    assert torch.equal(found["a"], truth)
    assert torch.equal(assign_family(family, {("h", "a"): scores.reshape(12, 12).double()})["h"], heads)


@pytest.mark.parametrize("see", [torch.Tensor.abs, torch.Tensor.clone], ids=["absolute", "signed"])
def test_correlated_heads_as_in_the_official_code(see):
    facts, tensors = golden("verma_mha")
    n = facts["n_heads"] * facts["head_dim"]
    family = Family("heads", facts["n_heads"], {"inner": facts["head_dim"]})
    found = assign_family(family, {("heads", "inner"): see(tensors["corr"][:n, n:].double())})
    entries = found["heads"][:, None] * facts["head_dim"] + found["inner"]
    official = tensors["unmerge"][n:].argmax(1)  # which merged unit every unit of the second model belongs to
    assert torch.equal(entries.flatten(), official.argsort())
