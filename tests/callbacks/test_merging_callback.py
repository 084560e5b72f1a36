"""What callbacks merge within a run: names, what is kept, ties, processes, random numbers."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning_merge.callbacks import MergeAfterFit, MergeAtSetup
from lightning_merge.callbacks.merging_callback import MergingCallback
from torch import nn

import lightning_merge as lm
from lightning_merge.checkpoints.statistics_files import save_statistics
from lightning_merge.checkpoints.views import Completed
from lightning_merge.methods import DARE, SCORE, Fisher, TaskArithmetic, WeightAverage
from tests.callbacks.project import Project, make_trainer, moved, read, write_models
from tests.utilities.test_processes import on_processes

EXPERTS = ["expert0.ckpt", "expert1.ckpt"]
TRAINER = SimpleNamespace(strategy=None, callbacks=[], datamodule=None)


class Compiled(nn.Module):
    """Has the parameters' names that ``torch.compile`` gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def merged(callback: MergingCallback, module, method=None, run=None):
    callback.check(TRAINER, module, {"method": method or WeightAverage()}, with_run=run is not None)
    return callback.merge(TRAINER, module, method or WeightAverage(), run)[0]


class TestNames:
    def test_a_bare_network_is_the_base_of_a_module_that_keeps_it(self):
        project = write_models("net")
        found = merged(MergingCallback("base.ckpt", EXPERTS, exclude=["head.*"]), project)
        one, two = (read(path) for path in EXPERTS)
        for name, tensor in project.state_dict().items():
            inner = name.removeprefix("net.")
            expected = tensor if inner == name or "num_batches" in name else (one[inner] + two[inner]) / 2
            torch.testing.assert_close(found[name], expected, msg=name)
        assert list(found) == list(project.state_dict())

    def test_experts_that_are_the_whole_module(self):
        project = write_models("net")
        lm.save_weights("whole.ckpt", moved(project.state_dict(), 7))
        found = merged(MergingCallback("base.ckpt", ["whole.ckpt"], exclude=["head.*"]), project)
        torch.testing.assert_close(found["net.0.weight"], read("whole.ckpt")["net.0.weight"])
        assert torch.equal(found["head.weight"], project.head.weight)

    def test_what_the_base_lacks_must_be_kept(self):
        project = write_models("net")
        for with_run in (True, False):
            with pytest.raises(lm.MergeError, match=r"has 'head.weight', which the base lacks.*exclude: \[head\.\*\]"):
                MergingCallback("base.ckpt", EXPERTS).check(TRAINER, project, {"m": WeightAverage()}, with_run)

    def test_a_pattern_that_only_an_unmerged_part_matches(self):
        project = write_models()
        extra = {**read("base.ckpt"), "old_head.weight": torch.ones(2)}
        lm.save_weights("base.ckpt", extra)
        callback = MergingCallback("base.ckpt", EXPERTS, exclude=["old_head.*"])
        assert merged(callback, project).keys() == project.state_dict().keys()
        with pytest.raises(lm.MergeError, match=r"lacks 'old_head\.weight', which the base has"):
            MergingCallback("base.ckpt", EXPERTS).check(TRAINER, project, {"m": WeightAverage()}, with_run=False)

    def test_a_compiled_network_keeps_the_keys_of_its_module(self):
        project = write_models()
        plain = merged(MergingCallback("base.ckpt", EXPERTS), project)
        project.net = Compiled(project.net)
        found = merged(MergingCallback("base.ckpt", EXPERTS), project, run=lm.open_weights(project.state_dict()))
        assert found.keys() == project.state_dict().keys()
        assert "net._orig_mod.0.weight" in found
        found = merged(MergingCallback("base.ckpt", EXPERTS), project)
        assert all(torch.equal(found[key], plain[key.replace("_orig_mod.", "")]) for key in found)

    def test_an_adapter_over_a_bare_network(self):
        import json
        from pathlib import Path

        project = write_models("net")
        A, B = torch.randn(2, 4), torch.randn(6, 2)
        Path("adapter").mkdir()
        Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
        keys = {"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B}
        lm.save_weights("adapter/adapter_model.safetensors", keys)
        found = merged(MergingCallback("base.ckpt", ["adapter"], exclude=["head.*"]), project, TaskArithmetic(scale=1))
        torch.testing.assert_close(found["net.0.weight"], project.net[0].weight + B @ A)

    def test_tied_weights_stay_tied(self):
        class Tied(Project):
            def __init__(self):
                super().__init__(width=5)
                self.more = nn.Linear(5, 5)
                self.more.weight = self.net[3].weight

        torch.manual_seed(0)
        tied = Tied()
        lm.save_weights("base.safetensors", tied.state_dict())
        without = {name: t for name, t in tied.state_dict().items() if name != "more.weight"}
        lm.save_weights("without.pt", without)
        expert = moved(tied.state_dict(), 1)
        lm.save_weights("expert.pt", {**expert, "more.weight": expert["net.3.weight"]})
        for base in ("base.safetensors", "without.pt"):
            found = merged(MergingCallback(base, ["expert.pt"]), tied, DARE(drop=0.5))
            assert found["more.weight"].data_ptr() == found["net.3.weight"].data_ptr()


def test_weights_that_lack_some_are_completed():
    whole = lm.open_weights({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)})
    part = lm.open_weights({"a": torch.ones(2), "b": torch.ones(3), "d": torch.ones(1)})
    found = Completed(part, whole, lambda name: name == "b")
    assert {name: tensor.sum().item() for name, tensor in found.items()} == {"a": 2, "b": 0, "c": 0}
    assert found.digest() == part.digest()


class TestTheRun:
    def test_is_one_of_the_experts_and_keeps_its_head(self):
        project = write_models()
        run = moved(project.state_dict(), 5)
        found = merged(MergingCallback("base.ckpt", EXPERTS, exclude=["head.*"]), project, run=lm.open_weights(run))
        names = [name for name in run if "num_batches" not in name]
        experts = [read(path) for path in EXPERTS]
        for name in names:
            mean = (experts[0][name] + experts[1][name] + run[name]) / 3
            torch.testing.assert_close(found[name], run[name] if name.startswith("head") else mean)

    def test_its_checkpoint_may_lack_what_is_frozen(self):
        project = write_models()
        run = {name: t for name, t in moved(project.state_dict(), 5).items() if not name.startswith("net.0")}
        found = merged(MergingCallback("base.ckpt", ["expert0.ckpt"]), project, run=lm.open_weights(run))
        torch.testing.assert_close(found["net.0.bias"], (read("expert0.ckpt")["net.0.bias"] + project.net[0].bias) / 2)

    def test_has_a_name_of_its_own(self):
        project = write_models()
        callback = MergingCallback("base.ckpt", {"x": "expert0.ckpt"}, name="x")
        with pytest.raises(lm.MergeError, match="This run is called 'x'"):
            callback.check(TRAINER, project, {"m": WeightAverage()}, with_run=True)

    def test_its_statistics_must_be_recorded(self):
        project = write_models()
        for path in EXPERTS:
            ones = {f"fisher.{name}": torch.ones_like(t) for name, t in project.named_parameters()}
            save_statistics(path.replace(".ckpt", ".statistics.safetensors"), ones, lm.open_weights(path), {})
        callback = MergingCallback("base.ckpt", EXPERTS)
        callback.check(TRAINER, project, {"m": Fisher()}, with_run=False)
        with pytest.raises(lm.MergeError, match=r"put RecordStatistics\(kinds=\['fisher'\]\) before MergingCallback"):
            callback.check(TRAINER, project, {"m": Fisher()}, with_run=True)


def test_the_module_and_random_numbers_stay():
    project = write_models()
    before = lm.open_weights(project.state_dict()).digest()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    merged(MergingCallback("base.ckpt", EXPERTS), project, DARE())
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert lm.open_weights(project.state_dict()).digest() == before


@pytest.mark.parametrize(
    "callback",
    [
        MergeAfterFit,
        MergeAtSetup,
    ],
)
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_divided_models_are_refused(callback, strategy):
    project = write_models()
    trainer = make_trainer()
    trainer.strategy.connect(project)
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(lm.MergeError, match=f"{strategy.__name__} divides it; use strategy ddp"):
        callback("base.ckpt", EXPERTS).setup(trainer, project, "fit" if callback is MergeAfterFit else "test")


class TestManyProcesses:
    """The same weights on every process, and as on one."""

    @pytest.mark.parametrize("count", [2, 3])
    def test_the_merge_is_shared(self, count):
        project = write_models()
        run = moved(project.state_dict(), 5)
        callback = MergingCallback("base.ckpt", EXPERTS, exclude=["head.*"])
        alone = lm.open_weights(merged(callback, project, SCORE(), lm.open_weights(run))).digest()

        def work(rank: int) -> str:
            own = {name: t + rank if "running" in name else t for name, t in run.items()}  # as under ddp
            return lm.open_weights(merged(callback, project, SCORE(), lm.open_weights(own))).digest()

        assert on_processes(count, work) == ([alone] * count, [None] * count)

    def test_files_that_only_the_first_sees(self):
        project = write_models()
        alone = lm.open_weights(merged(MergingCallback("base.ckpt", EXPERTS), project)).digest()

        def work(rank: int, elsewhere: str) -> str:
            experts = EXPERTS if rank == 0 else ["expert0.ckpt", elsewhere]
            return lm.open_weights(merged(MergingCallback("base.ckpt", experts), project)).digest()

        lm.save_weights("other.ckpt", {**read("base.ckpt"), "more": torch.ones(2)})
        for elsewhere in ("gone.ckpt", "other.ckpt"):
            assert on_processes(2, lambda rank, e=elsewhere: work(rank, e)) == ([alone] * 2, [None] * 2)

    def test_what_is_wrong_on_the_first_stops_all(self):
        project = write_models()

        def work(rank: int) -> None:
            merged(MergingCallback("base.ckpt", ["gone.ckpt"]), project)

        _, errors = on_processes(2, work)
        assert all("no file or folder gone.ckpt" in error for error in errors)
