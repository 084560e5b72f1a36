"""Groups of parameters by name."""

from __future__ import annotations

import pytest

import lightning_merge as lm
from lightning_merge.analysis import group_of, grouped
from lightning_merge.analysis.groups import by_depth


def test_the_block_or_the_first_part():
    names = ["backbone.blocks.3.attn.qkv.weight", "backbone.blocks.10.norm.bias", "head.weight", "scale", "0.weight"]
    assert [group_of(name) for name in names] == ["backbone.blocks.3", "backbone.blocks.10", "head", "scale", "0"]


def test_patterns():
    names = ["a.qkv", "b.fc", "c.qkv"]
    assert grouped(names, ".*qkv") == {"a.qkv": ["a.qkv"], "other": ["b.fc"], "c.qkv": ["c.qkv"]}
    assert grouped(names, "[ab]?") == {"a": ["a.qkv"], "b": ["b.fc"], "other": ["c.qkv"]}
    with pytest.raises(lm.MergeError, match="is no regular expression"):
        grouped(names, "(")


def test_numbers_are_counted():
    model = ["pos", *(f"blocks.{i}.{part}" for i in range(12) for part in ("attn", "mlp.0", "mlp.10")), "norm"]
    assert by_depth(model) == model
    found = by_depth(sorted(model))
    assert [name for name in found if name.startswith("blocks")] == model[1:-1]
    assert sorted(found) == sorted(model)
