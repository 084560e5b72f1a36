"""A method applied to models, parameter by parameter, against plain arithmetic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import lightning_merge as lm
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


HALF = {"layer.weight": torch.full((4, 4), 3e4), "layer.bias": torch.ones(4)}


def halves(moved_by: float = 2e4) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A base in float16 and three experts whose sum leaves it behind."""
    base = {name: tensor.half() for name, tensor in HALF.items()}
    return base, [{name: tensor + moved_by for name, tensor in base.items()} for _ in range(3)]


class TestNumbersThatAreTooLarge:
    def test_the_base_s_type_does_not_hold_them(self):
        base, experts = halves()
        with pytest.raises(lm.MergeError) as caught:
            lm.merge(base, experts, TaskArithmetic(scale=1.0))
        sentence = str(caught.value)
        assert sentence.startswith("'layer.weight', merged by TaskArithmetic, reaches 9e+04, and torch.float16")
        assert "ends at 6.55e+04; give the base in float32, or a smaller scale than 1, or keep" in sentence

    def test_each_remedy_works(self):
        base, experts = halves()
        wide = {name: tensor.float() for name, tensor in base.items()}
        for model, scale, reached in ((wide, 1.0, 9e4), (base, 0.5, 6e4)):
            weight = lm.merge(model, experts, TaskArithmetic(scale=scale)).weights["layer.weight"]
            assert weight.unique().item() == pytest.approx(reached, rel=1e-3)
        kept = lm.merge(base, experts, TaskArithmetic(scale=1.0), exclude=["layer.weight"]).weights
        assert torch.equal(kept["layer.weight"], base["layer.weight"])

    @pytest.mark.parametrize("output", ["merged.safetensors", "merged.ckpt"])
    def test_nothing_is_half_written_and_what_stood_there_stays(self, tmp_path, output):
        base, experts = halves()
        lm.merge(base, experts, TaskArithmetic(scale=0.5), output=tmp_path / output)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(lm.MergeError, match=r"reaches 9e\+04"):
            lm.merge(base, experts, TaskArithmetic(scale=1.0), output=tmp_path / output)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files

    def test_a_model_for_a_task_and_another_scale(self):
        base, experts = halves(1e4)
        merged = lm.merge(base, experts[:2], EMR(), keep_update=True)
        assert merged.for_task(next(iter(merged.experts)))
        with pytest.raises(lm.MergeError, match=r"'layer\.weight', merged by EMR, reaches"):
            merged.rescaled(10.0)
        computation = merged.computation
        with pytest.raises(lm.MergeError, match="a smaller scale than 20"):
            computation.rescaled(20.0).for_task(0)

    def test_float32_on_the_way(self):
        base, expert = {"w": torch.zeros(2)}, {"w": torch.full((2,), 3e38)}
        method = TaskArithmetic(scale=0.25)
        assert torch.equal(lm.merge(base, [expert] * 3, method).weights["w"], torch.full((2,), 2.25e38))
        with pytest.raises(lm.MergeError, match=r"not finite in 2 of 2 entries, though all inputs are; compute with"):
            lm.merge(base, [expert] * 3, method, dtype=torch.float32)
        lm.merge(base, [expert] * 3, method, dtype=torch.float64)  # the remedy

    def test_permission_is_for_inputs_that_are_not_finite(self):
        base, experts = halves()
        with pytest.raises(lm.MergeError, match=r"reaches 9e\+04"):
            lm.merge(base, experts, TaskArithmetic(scale=1.0), allow_non_finite=True)
        experts[0]["layer.bias"][0] = float("nan")  # a survey would carry it into all parameters
        merged = lm.merge(base, experts, TaskArithmetic(scale=1.0), allow_non_finite=True).weights
        assert bool(merged["layer.weight"].isinf().all())

    def test_running_statistics(self):
        states = [{"w": torch.ones(2), "bn.running_var": torch.full((2,), 3e38)} for _ in range(4)]
        merged = lm.merge(states[0], states[1:], TaskArithmetic()).weights
        assert torch.equal(merged["bn.running_var"], states[0]["bn.running_var"])

    def test_what_lapack_says_is_no_sentence(self):
        class Inverts(MergeMethod):
            def matrix(self, deltas, context):
                return torch.linalg.inv(deltas.sum(dim=0))

        with pytest.raises(lm.MergeError, match="Inverts cannot factorize 'w': its values are not finite, or too far"):
            lm.merge({"w": torch.zeros(2, 2)}, [{"w": torch.ones(2, 2)}], Inverts())
