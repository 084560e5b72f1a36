"""Which matrices are looked at closely."""

from __future__ import annotations

from benchmarks.models import SHAPES, parameters
from lightning_merge.analysis.choosing import BUDGET, choose, operations
from lightning_merge.analysis.compare_experts import Matrices


def costs(shape: str, experts: int = 8, merged: int = 1) -> dict[str, float]:
    views = {name: Matrices().view(name, size) for name, size in parameters(*SHAPES[shape])}
    return {name: operations(*view, experts, merged) for name, view in views.items() if view}


def test_all_of_a_small_model_and_some_of_every_kind_of_a_large_one():
    small, large = costs("vit_small"), costs("vit_base")
    assert choose(small) == list(small)
    assert choose(large) == [
        f"blocks.{block}.{kind}.weight" for block in (0, 11) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert sum(large[name] for name in choose(large)) <= BUDGET


def test_spreads_over_depth_and_passes_over_what_does_not_fit():
    given = {f"block.{i}.a": 1.0 for i in range(9)} | {f"block.{i}.big": 10.0 for i in range(9)} | {"head": 1.0}
    assert choose(given, 6.5) == ["block.0.a", "block.2.a", "block.4.a", "block.6.a", "block.8.a", "head"]
    assert choose(given, 1e9) == list(given)
    assert choose(given, 0.5) == []
    assert choose({}) == []


def test_costs_grow_with_what_there_is_to_do():
    one = operations(1, 64, 32, 4, 0)
    assert operations(3, 64, 32, 4, 0) == 3 * one
    assert one < operations(1, 64, 32, 4, 2) < operations(1, 64, 32, 8, 2)
    assert operations(1, 64, 32, 1, 0) > 0
