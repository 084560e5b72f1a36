"""What a method sees of the experts' differences to the base."""

from __future__ import annotations

import math

import pytest
import torch

import lightning_merge as lm
from lightning_merge.checkpoints import open_weights
from lightning_merge.checkpoints.differences import Dense, Difference, Product
from lightning_merge.methods.base.matrices import Matrices
from lightning_merge.methods.base.task_vectors import ExpertTaskVectors, TaskVectors
from lightning_merge.utilities.tensors import Scratch
from tests.toys import base_weights, expert_weights

NAMES = ("conv.weight", "mlp.weight", "mlp.bias", "logit_scale")
BASE = base_weights()
EXPERTS = [expert_weights(BASE, seed) for seed in range(3)]


def task_vectors(base=BASE, experts=EXPERTS, names=NAMES, **arguments) -> ExpertTaskVectors:
    return ExpertTaskVectors(open_weights(base), [open_weights(expert) for expert in experts], names, **arguments)


def difference(name: str) -> torch.Tensor:
    return torch.stack([expert[name] - BASE[name] for expert in EXPERTS])


def half(deltas, context):
    return deltas / 2


def minus_base(deltas, context):
    return deltas - context.base


def test_only_what_says_how_it_is_computed_can_be_made():
    with pytest.raises(TypeError, match="abstract"):
        TaskVectors(NAMES, Matrices(), 0)


class TestExpertTaskVectors:
    def test_are_the_differences_to_the_base(self):
        vectors = task_vectors()
        assert (tuple(vectors), len(vectors), vectors.num_experts) == (NAMES, 4, 3)
        for name, deltas in vectors.items():
            assert torch.equal(deltas, difference(name))

    def test_are_taken_in_the_precision_of_the_weights_and_then_converted(self):
        vectors = task_vectors(dtype=torch.float64)
        assert torch.equal(vectors["mlp.weight"], difference("mlp.weight").double())
        low = task_vectors(base_weights(torch.bfloat16), [expert_weights(base_weights(torch.bfloat16), 1)])
        assert low["mlp.weight"].dtype == torch.float32

    def test_a_stream_uses_its_memory_again(self):
        vectors = task_vectors()
        seen = [(name, deltas.data_ptr(), deltas.clone()) for name, deltas in vectors.stream()]
        assert [name for name, _, _ in seen] == [*NAMES]
        assert len({place for _, place, _ in seen}) == 1
        for name, _, deltas in seen:
            assert torch.equal(deltas, difference(name))

    def test_are_put_where_they_are_asked_for(self):
        scratch = Scratch()
        vectors = task_vectors()
        one = vectors.stack("mlp.weight", BASE["mlp.weight"], scratch)
        other = vectors.stack("mlp.weight", BASE["mlp.weight"], scratch)
        assert one.data_ptr() == other.data_ptr() != vectors["mlp.weight"].data_ptr()

    def test_shapes_are_known_without_reading(self):
        base = open_weights(BASE)
        base._readers = dict.fromkeys(base, None)  # whoever reads fails
        vectors = ExpertTaskVectors(base, [base], NAMES)
        assert [vectors.shape(name) for name in NAMES] == [(8, 3, 2, 2), (12, 8), (12,), ()]
        assert [vectors.numel(name) for name in NAMES] == [96, 96, 12, 1]
        assert [vectors.is_matrix(name) for name in NAMES] == [False, True, False, False]

    def test_a_context_has_the_base_and_a_seed_of_its_own(self):
        vectors = task_vectors(seed=3, dtype=torch.float64, matrices=Matrices(exclude=()))
        context = vectors.context("mlp.weight", survey="found")
        assert (context.name, context.survey, context.matrices) == ("mlp.weight", "found", Matrices(exclude=()))
        assert torch.equal(context.base, BASE["mlp.weight"].double())
        read = vectors.context("mlp.weight", base=BASE["mlp.weight"])
        assert torch.equal(read.base, context.base)
        seeds = {vectors.context(name).seed for name in NAMES}
        assert len(seeds) == len(NAMES)
        assert task_vectors(seed=3).context("mlp.weight").seed == context.seed
        assert task_vectors(seed=4).context("mlp.weight").seed != context.seed

    def test_a_difference_that_is_known_is_exact(self):
        base = open_weights({"a": torch.full((3,), 1e4)})
        small = torch.full((3,), 1e-5)
        stored = open_weights({"delta": small})
        expert = Difference("expert", stored, base, {"a": Dense(lambda: stored["delta"])}, {})
        assert torch.equal(expert["a"], base["a"])  # rounded away
        assert torch.equal(ExpertTaskVectors(base, [expert], ["a"])["a"][0], small)

    def test_factors_are_those_of_all_experts_or_unknown(self):
        base = open_weights({"w": torch.randn(4, 3), "b": torch.zeros(4)})
        stored = open_weights({"A": torch.randn(2, 3), "B": torch.randn(4, 2)})
        product = Product(lambda: stored["A"], lambda: stored["B"])
        adapter = Difference("adapter", stored, base, {"w": product}, {})
        factors = ExpertTaskVectors(base, [adapter, adapter], ["w", "b"])
        assert [tuple(side.shape for side in pair) for pair in factors.factors("w")] == [((4, 2), (2, 3))] * 2
        assert factors.factors("b") == []  # no expert moves it
        assert ExpertTaskVectors(base, [adapter, base], ["w"]).factors("w") is None

    def test_without_a_module_there_are_no_tasks(self):
        with pytest.raises(lm.MergeError, match="A method that runs the model"):
            _ = task_vectors().tasks
        tasks = object()
        assert task_vectors(tasks=tasks).tasks is tasks


class TestMap:
    def test_transforms_what_is_read(self):
        vectors = task_vectors()
        seen = vectors.map(half)
        for name, deltas in seen.items():
            assert torch.equal(deltas, difference(name) / 2)
        assert [name for name, deltas in seen.stream() if torch.equal(deltas, seen[name])] == [*NAMES]
        assert torch.equal(vectors["mlp.bias"], difference("mlp.bias"))

    def test_transformations_follow_each_other(self):
        name = "mlp.weight"
        first_half = task_vectors().map(half).map(minus_base)[name]
        assert torch.equal(first_half, difference(name) / 2 - BASE[name])
        half_last = task_vectors().map(minus_base).map(half)[name]
        assert torch.equal(half_last, (difference(name) - BASE[name]) / 2)

    def test_all_else_stays(self):
        tasks = object()
        vectors = task_vectors(seed=5, tasks=tasks, matrices=Matrices(split=["mlp*"]))
        seen = vectors.map(half).map(minus_base)
        assert (tuple(seen), len(seen), seen.num_experts) == (NAMES, 4, 3)
        assert (seen.matrices, seen.seed, seen.tasks) == (vectors.matrices, 5, tasks)
        for name in NAMES:
            assert seen.shape(name) == vectors.shape(name)
            assert seen.numel(name) == math.prod(vectors.shape(name))
            assert seen.is_matrix(name) == vectors.is_matrix(name)
            context, expected = seen.context(name, "found"), vectors.context(name)
            assert (context.seed, context.survey) == (expected.seed, "found")
            assert torch.equal(context.base, expected.base)

    def test_factors_are_no_longer_those_of_what_is_seen(self):
        base = open_weights({"w": torch.randn(4, 3)})
        stored = open_weights({"A": torch.randn(2, 3), "B": torch.randn(4, 2)})
        product = Product(lambda: stored["A"], lambda: stored["B"])
        vectors = ExpertTaskVectors(base, [Difference("adapter", stored, base, {"w": product}, {})], ["w"])
        assert vectors.factors("w") is not None
        assert vectors.map(half).factors("w") is None
