"""A method applied to models, parameter by parameter, against plain arithmetic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lightning_merge.checkpoints import open_weights
from lightning_merge.merging.computation import Computation
from lightning_merge.merging.inventory import take_inventory
from lightning_merge.methods import EMR, TSVM, MergeMethod, TaskArithmetic
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors
from tests.toys import base_weights, expert_weights


def make(method: MergeMethod, dtype: torch.dtype = torch.float64, **more) -> Computation:
    base = base_weights(dtype)
    experts = {name: open_weights(expert_weights(base, seed), name) for name, seed in (("photo", 1), ("sketch", 2))}
    origin = open_weights(base, "base")
    inventory = take_inventory(origin, list(experts.values()))
    task_vectors = ExpertTaskVectors(origin, list(experts.values()), inventory.merged, dtype)
    return Computation(method, origin, experts, task_vectors, method.survey(task_vectors), inventory, **more)


def expected(computation: Computation, name: str, scale: float) -> torch.Tensor:
    """Task arithmetic by hand; running statistics are averaged, integers copied."""
    base, inventory = computation.base[name], computation.inventory
    experts = torch.stack([expert[name] for expert in computation.experts.values()])
    if name in inventory.copied:
        return base
    return experts.mean(dim=0) if name in inventory.averaged else base + scale * (experts - base).sum(dim=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_parameter_is_what_arithmetic_gives(workers):
    computation = make(TaskArithmetic(scale=0.3), workers=workers)
    names = computation.inventory.stored
    assert set(names) >= {"conv.weight", "bn.running_var", "bn.num_batches_tracked"}
    merged = computation.parameters(names)
    assert list(merged) == list(names)
    for name in names:
        torch.testing.assert_close(merged[name], expected(computation, name, 0.3), rtol=1e-12, atol=1e-12)
        assert merged[name].dtype == computation.base[name].dtype


def test_updates_that_are_kept_are_computed_once_and_rescaled(monkeypatch):
    updates: dict[str, torch.Tensor] = {}
    computation = make(TaskArithmetic(scale=0.3), updates=updates)
    computed: Counter[str] = Counter()
    update = TaskArithmetic.update

    def count(self, deltas, context):
        computed[context.name] += 1
        return update(self, deltas, context)

    monkeypatch.setattr(TaskArithmetic, "update", count)
    first, second = computation.all_merged(), computation.rescaled(0.7).all_merged()
    assert set(computed.values()) == {1}
    assert set(computed) == set(updates) == set(computation.inventory.merged)
    for name in computation.inventory.merged:
        torch.testing.assert_close(first[name], expected(computation, name, 0.3), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(second[name], expected(computation, name, 0.7), rtol=1e-12, atol=1e-12)


def test_only_methods_that_keep_a_model_for_each_task_give_one():
    assert make(TaskArithmetic()).for_task(0) == {}
    computation = make(EMR())
    first, second = computation.for_task(0), computation.for_task(1)
    assert set(first) == set(second) == set(computation.all_merged())
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_aliases_are_the_tensor_that_they_are_tied_to():
    weight = torch.randn(4, 4)
    base = open_weights({"a": weight, "b": weight}, "base")
    moved = weight + 1
    expert = open_weights({"a": moved, "b": moved}, "expert")
    inventory = take_inventory(base, [expert])
    assert inventory.tied
    task_vectors = ExpertTaskVectors(base, [expert], inventory.merged)
    merged = Computation(TaskArithmetic(), base, {"one": expert}, task_vectors, None, inventory).all_merged()
    assert set(merged) == {"a", "b"}
    assert merged["a"] is merged["b"]


def test_a_matrix_costs_more_where_it_is_factorized():
    entries, factorized = make(TaskArithmetic()), make(TSVM())
    matrix = next(name for name in entries.inventory.merged if entries.base.meta[name].dim() == 2)
    m, n = entries.base.meta[matrix].shape
    assert entries.cost(matrix) == m * n
    assert factorized.cost(matrix) == m * n * (min(m, n) + 1)
