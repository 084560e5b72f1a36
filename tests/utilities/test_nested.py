"""Values within values: walks are linear, whatever is shared; what is too large, too deep or circular is refused."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch

import lightning_merge as lm
from lightning_merge.utilities.nested import check_expanded, replace_tensors, walk


def shared(levels: int, make=lambda part: {"a": part, "b": [part, part]}):
    content = [1]
    for _ in range(levels):
        content = make(content)
    return content


def test_a_walk_visits_every_container_once():
    assert len(list(walk(shared(60)))) < 400
    assert [(key, value) for key, value in walk({"a": 1}) if key] == [("a", 1)]


@pytest.mark.parametrize(
    "make", [lambda part: [part, part], lambda part: (part, part), lambda part: {0: part, 1: part}]
)
def test_what_has_more_parts_than_can_be_visited_is_refused_at_once(make):
    with pytest.raises(lm.MergeError, match=r"The file holds lists or mappings of more than 1,000,000 values"):
        check_expanded("The file", shared(60, make))


def test_what_is_too_deep_is_refused():
    with pytest.raises(lm.MergeError, match="100 levels"):
        check_expanded("The file", shared(100_000, lambda part: [part]))


def test_what_holds_itself_is_refused():
    content: dict = {"a": [1]}
    content["a"].append(content)
    with pytest.raises(lm.MergeError, match="holds itself"):
        check_expanded("The file", content)


def test_ordinary_values_pass():
    part = {"lr": 0.1, "betas": (0.9, 0.999)}
    check_expanded(
        "The file", {"optimizer": part, "again": part, "classes": list(range(1000)), "none": None, "text": "a"}
    )


def test_tensors_are_replaced_and_all_else_stays():
    Pair = namedtuple("Pair", "one other")
    one, lists = torch.ones(2), [torch.zeros(1)]
    content = {
        "ordered": OrderedDict(a=one),
        "default": defaultdict(list, a=[one]),
        "pair": Pair(one, 3),
        "shared": [lists, lists],
        "set": {1, 2},
    }
    replaced = replace_tensors(content, lambda tensor: tensor + 1)
    assert type(replaced["ordered"]) is OrderedDict
    assert torch.equal(replaced["ordered"]["a"], one + 1)
    assert type(replaced["default"]) is defaultdict
    assert torch.equal(replaced["default"]["a"][0], one + 1)
    assert torch.equal(replaced["pair"].one, one + 1)
    assert replaced["pair"].other == 3
    assert replaced["shared"][0] is replaced["shared"][1]
    assert replaced["set"] == {1, 2}
    assert torch.equal(one, torch.ones(2))
    assert torch.equal(lists[0], torch.zeros(1))
