"""What happens to every parameter, and what does not fit, from names, shapes and dtypes alone."""

from __future__ import annotations

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints import Weights, open_weights
from lightning_merge.merging.inventory import compare, take_inventory

SHAPES = {"layer.weight": (3, 2), "layer.bias": (3,), "bn.running_mean": (3,), "head.weight": (5, 3)}


def model(name: str, changes: dict[str, torch.Tensor | None] | None = None) -> Weights:
    """A model with BatchNorm's statistics, an integer buffer and a head, some of it changed or left out."""
    state = {key: torch.zeros(shape) for key, shape in SHAPES.items()} | {"bn.num_batches_tracked": torch.tensor(0)}
    state |= changes or {}
    return open_weights({key: tensor for key, tensor in state.items() if tensor is not None}, name)


def test_every_parameter_has_one_fate():
    inventory = take_inventory(model("base"), [model("photo"), model("sketch")], exclude=["head.*"])
    assert inventory.merged == ("layer.weight", "layer.bias")
    assert inventory.averaged == ("bn.running_mean",)
    assert set(inventory.copied) == {"bn.num_batches_tracked", "head.weight"}
    assert inventory.private == {"photo": ("head.weight",), "sketch": ("head.weight",)}
    assert sorted(inventory.stored) == sorted([*SHAPES, "bn.num_batches_tracked"])


def test_no_tensor_is_read(monkeypatch):
    models = [model("base"), model("photo")]
    monkeypatch.setattr(Weights, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    assert take_inventory(models[0], models[1:]).merged


def test_only_what_is_included_is_merged():
    inventory = take_inventory(model("base"), [model("photo")], include=["layer.*"], exclude=["*.bias"])
    assert inventory.merged == ("layer.weight",)
    assert set(inventory.copied) >= {"layer.bias", "head.weight"}


def test_tied_names_stay_tied():
    weight = torch.zeros(4, 4)
    models = [open_weights({"a": weight, "b": weight}, name) for name in ("base", "photo")]
    inventory = take_inventory(models[0], models[1:])
    assert inventory.tied == {"b": "a"}
    assert inventory.merged == ("a",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer.bias": None}, ["'layer.bias'", "photo"]),
        ({"layer.bias": torch.zeros(4)}, ["'layer.bias'", "photo", "(4,)", "(3,)"]),
        ({"new.weight": torch.zeros(2)}, ["'new.weight'", "photo"]),
        ({"layer.bias": torch.zeros(3, dtype=torch.int64)}, ["'layer.bias'", "photo"]),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    _, problems = compare(model("base"), [model("photo", changes)])
    assert len(problems) == 1
    assert all(word in problems[0] for word in words)


def test_all_conflicts_are_listed_at_once():
    experts = [model("photo", {"layer.bias": torch.zeros(4)}), model("sketch", {"layer.weight": None})]
    with pytest.raises(lm.MergeError) as error:
        take_inventory(model("base"), experts, exclude=["hed.*"])
    assert len(error.value.problems) == 3
    assert "'hed.*'" in str(error.value)
