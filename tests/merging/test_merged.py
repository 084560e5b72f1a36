"""The result of a merge: the models of the tasks, other scales, and what is written."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import lightning_merge as lm
from lightning_merge.merging.repair_result import RepairResult
from lightning_merge.merging.repairing import ALL_TASKS, Repair, repair
from lightning_merge.methods import SCORE, TSVM, TALLMask, TaskArithmetic, WeightAverage
from lightning_merge.repair import Pool, insert, tact
from lightning_merge.repair import repair as repair_activations
from tests.repair.models import VGG, expert_of, images


def changed(one, other) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


class TestForTask:
    def test_a_head_of_each_expert_s_own(self, base, experts):
        del base["head.weight"]
        experts["b"]["head.weight"] = torch.ones(5, 8)
        merged = lm.merge(base, experts, SCORE(), exclude=["head.*"])
        assert "head.weight" not in merged.weights
        assert torch.equal(merged.for_task("b")["head.weight"], torch.ones(5, 8))
        assert torch.equal(merged.for_task("b")["mlp.weight"], merged.weights["mlp.weight"])
        with pytest.raises(lm.MergeError, match="experts are a, b, c"):
            merged.for_task("d")

    def test_what_is_given_for_a_task_is_the_caller_s_to_change(self, base, experts):
        merged = lm.merge(base, experts, SCORE(), exclude=["head.*"])
        before = experts["b"]["head.weight"].clone()
        merged.for_task("b")["head.weight"].add_(1)
        assert torch.equal(experts["b"]["head.weight"], before)

    def test_a_method_with_a_model_for_each_task(self, base, experts):
        """Where a mask is all ones the model of a task is that of the sum of the task vectors, elsewhere the base."""
        merged = lm.merge(base, experts, TALLMask())
        update = sum(expert["mlp.weight"] - base["mlp.weight"] for expert in experts.values())
        for_task = merged.for_task("b")["mlp.weight"]
        kept = (for_task - base["mlp.weight"]).abs() > 0
        assert 0 < kept.float().mean() < 1
        torch.testing.assert_close(for_task, torch.where(kept, base["mlp.weight"] + update, base["mlp.weight"]))

    @pytest.mark.parametrize(
        ("method", "exclude", "knows"),
        [(SCORE(), (), False), (SCORE(), ("head.*",), True), (TALLMask(), (), True)],
        ids=str,
    )
    def test_whether_the_models_of_the_tasks_may_differ(self, base, experts, method, exclude, knows):
        merged = lm.merge(base, experts, method, exclude=exclude)
        assert merged.knows_tasks == knows
        differ = any(changed(merged.weights, merged.for_task(name)) for name in experts)
        assert differ == knows


class TestRepair:
    """What a repair changes, told by hand."""

    def merged(self, base, experts):
        return lm.merge(base, experts, WeightAverage(), exclude=["head.*"])

    def test_none(self, base, experts):
        merged = self.merged(base, experts)
        assert merged.repair is None
        assert merged.corrections == merged.heads == {}

    def test_a_change_for_each_task_is_made_to_its_complete_weights(self, base, experts):
        merged = self.merged(base, experts)
        heads = {name: {"head.weight": torch.full((3, 8), float(i))} for i, name in enumerate(experts)}
        changes = {name: lambda weights, head=head: weights | head for name, head in heads.items()}
        repaired = replace(merged, repair=RepairResult(changes, heads=heads))
        assert repaired.heads is heads
        for name, head in heads.items():
            assert changed(repaired.for_task(name), merged.for_task(name)) == {"head.weight"}
            assert torch.equal(repaired.for_task(name)["head.weight"], head["head.weight"])
        assert not changed(repaired.weights, merged.weights)

    def test_a_change_that_the_weights_have_already_is_not_made_twice(self, base, experts):
        merged = self.merged(base, experts)

        def double(weights):
            return {name: 2 * tensor for name, tensor in weights.items()}

        result = RepairResult(dict.fromkeys(experts, double), unrepaired=merged.weights)
        repaired = replace(merged, weights=double(merged.weights), repair=result)
        assert torch.equal(repaired.for_task("b")["mlp.weight"], 2 * merged.weights["mlp.weight"])
        assert torch.equal(repaired.for_task("b")["head.weight"], 2 * experts["b"]["head.weight"])

    def test_a_repaired_model_knows_tasks_and_is_not_rescaled(self, base, experts):
        merged = lm.merge(base, experts, TaskArithmetic(), keep_update=True)
        assert not merged.knows_tasks
        repaired = replace(merged, repair=RepairResult(dict.fromkeys(experts, dict)))
        assert repaired.knows_tasks
        merged.rescaled(0.5)
        with pytest.raises(lm.MergeError, match="rescale first"):
            repaired.rescaled(0.5)


class TestRepaired:
    """The models that ``repair`` gives compute what the merged one does with the corrections applied as it runs."""

    @pytest.fixture
    def module(self):
        torch.manual_seed(0)
        return VGG().double().eval()

    def experts_and_data(self, module):
        data = {name: [images(20, seed=i).double()] for i, name in enumerate("ab")}
        return {name: expert_of(module, i) for i, name in enumerate("ab")}, data

    def test_tact(self, module):
        experts, data = self.experts_and_data(module)
        merged = lm.merge(module.state_dict(), experts, WeightAverage(), exclude=["head.*"])
        repaired = repair(Repair(), merged, module, data)
        assert list(repaired.corrections) == ["a", "b"]
        assert not changed(repaired.weights, merged.weights)
        corrections = tact(module, merged.for_task, experts, data)
        for task, correction in corrections.items():
            self.check(module, merged, repaired, task, correction, data)

    def test_repair(self, module):
        experts, data = self.experts_and_data(module)
        merged = lm.merge(module.state_dict(), experts, WeightAverage(), exclude=["head.*"])
        repaired = repair(Repair(by="repair"), merged, module, data)
        assert list(repaired.corrections) == [ALL_TASKS]
        assert [site.name for site in repaired.corrections[ALL_TASKS].sites] == ["unit"]  # no weight can hold that one
        correction = repair_activations(module, merged.weights, experts, Pool(data))
        for task in experts:
            self.check(module, merged, repaired, task, correction, data)

    def check(self, module, merged, repaired, task, correction, data):
        x = data[task][0]
        with torch.no_grad():
            before = functional_call(module, merged.for_task(task), (x,))
            with correction.applied(module):
                expected = functional_call(module, merged.for_task(task), (x,))
            weights = repaired.for_task(task)
            found = functional_call(insert(module, self.unfolded(repaired, task, correction)), weights, (x,))
        torch.testing.assert_close(found, expected)
        assert (found - before).abs().max() > 1e-2

    def unfolded(self, repaired, task, correction):
        names = {name.removesuffix(".scale") for name in repaired.for_task(task) if name.endswith("correction.scale")}
        sites = [site for site in correction.sites if f"{site.path}.correction" in names]
        assert len(sites) == len(names)
        return correction.only(sites)


def test_summary_counts(base, experts):
    text = lm.merge(base, experts, SCORE(), exclude=["head.*"]).summary()
    assert text == (
        "SCORE of 3 experts (a, b, c): 6 parameters merged, 2 running statistics averaged, 2 copied from the base"
    )


def test_a_merged_model_can_be_copied(base, experts):
    merged = copy.deepcopy(lm.merge(base, experts, TSVM(), keep_update=True))
    half = lm.merge(base, experts, TSVM(scale=0.5)).weights
    assert torch.equal(merged.rescaled(0.5).weights["mlp.weight"], half["mlp.weight"])


class TestSave:
    def test_torch_reads_what_is_written(self, base, experts):
        merged = lm.merge(base, experts, WeightAverage())
        assert merged.save("merged.pt") == Path("merged.pt").resolve()
        written = torch.load("merged.pt", weights_only=True)
        assert not changed(written, merged.weights)
        state = torch.load(merged.save("merged.ckpt"), weights_only=True)["state_dict"]
        assert not changed(state, merged.weights)

    def test_what_cannot_be_written_leaves_what_stood_there(self, base, experts, monkeypatch):
        merged = lm.merge(base, experts, WeightAverage())
        merged.save("merged.safetensors")
        before = Path("merged.safetensors").read_bytes()
        weights = {name: tensor for name, tensor in merged.weights.items() if name != "proj.weight"}
        with pytest.raises(KeyError):
            replace(merged, weights=weights).save("merged.safetensors")
        assert Path("merged.safetensors").read_bytes() == before
        with pytest.raises(lm.MergeError, match=r"merged\.onnx"):
            merged.save("merged.onnx")
