"""Starting from a merged model, with nothing on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_merge.callbacks import MergeAtSetup
from torch import nn

import lightning_merge as lm
from lightning_merge.methods import SCORE, TaskArithmetic
from tests.callbacks.project import Data, Project, fork, make_net, make_trainer, read, write_models

EXPERTS = ["expert0.ckpt", "expert1.ckpt"]


def same(module, expected) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_a_stage_runs_the_merged_model(stage):
    project, before = write_models(), set(Path().iterdir())
    expected = lm.merge("base.ckpt", EXPERTS, SCORE()).weights
    trainer = make_trainer(MergeAtSetup("base.ckpt", EXPERTS))
    for _ in range(2):
        getattr(trainer, stage)(project, datamodule=Data())
        assert same(project, expected)
    assert {path for path in Path().iterdir() if path.is_file()} <= before
    other = Project()
    other.load_state_dict(expected)
    if stage != "predict":
        found, wanted = (getattr(t, stage) for t in (trainer, make_trainer()))
        assert found(project, Data(), verbose=False) == wanted(other, Data(), verbose=False)


def test_what_is_excluded_stays_the_module_s():
    project = write_models("net")
    head = project.head.weight.clone()
    callback = MergeAtSetup("base.ckpt", EXPERTS, TaskArithmetic(scale=0.5), exclude=["head.*"])
    make_trainer(callback).test(project, Data())
    expected = lm.merge("base.ckpt", EXPERTS, TaskArithmetic(scale=0.5)).weights
    assert torch.equal(project.head.weight, head)
    assert same(project.net, expected)


def test_a_fit_starts_from_it_and_resumes_from_its_checkpoint():
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    seen: list[dict[str, torch.Tensor]] = []
    project = write_models()
    merging = MergeAtSetup("base.ckpt", EXPERTS, stages=["fit"])
    checkpoint = ModelCheckpoint(dirpath="run", filename="last")
    trainer = make_trainer(merging, Start(), checkpoint, enable_checkpointing=True)
    trainer.fit(project, Data())
    expected = lm.merge("base.ckpt", EXPERTS, SCORE()).weights
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in expected.items())
    trainer.test(project, Data(), verbose=False)
    assert same(project, read("run/last.ckpt"))
    again = make_trainer(merging, Start(), max_epochs=3)
    again.fit(Project(), Data(), ckpt_path="run/last.ckpt")
    assert all(torch.equal(seen[1][name], tensor) for name, tensor in read("run/last.ckpt").items())


def test_a_checkpoint_that_would_replace_it_is_refused():
    project = write_models()
    trainer = make_trainer(MergeAtSetup("base.ckpt", EXPERTS), enable_checkpointing=True, max_epochs=1)
    trainer.fit(project, Data())
    with pytest.raises(lm.MergeError, match=r"trainer\.test\(model\) with the model"):
        trainer.test(datamodule=Data())
    for stage in ("test", "validate", "predict"):
        with pytest.raises(lm.MergeError, match=rf"trainer\.{stage}\(model\) .* without ckpt_path"):
            getattr(trainer, stage)(project, datamodule=Data(), ckpt_path=trainer.checkpoint_callback.best_model_path)
    trainer.test(project, Data(), verbose=False)
    assert same(project, lm.merge("base.ckpt", EXPERTS, SCORE()).weights)


def test_layers_that_are_made_late():
    class Late(Project):
        def __init__(self):
            super().__init__()
            self.net = self.head = None

        def configure_model(self):
            self.net, self.head = make_net(), nn.Linear(5, 3)

    write_models()
    with pytest.raises(lm.MergeError, match=r"configure_model\(\) is not there yet; make its layers in __init__"):
        make_trainer(MergeAtSetup("base.ckpt", EXPERTS)).test(Late(), Data())


def test_fast_dev_run():
    project = write_models()
    make_trainer(MergeAtSetup("base.ckpt", EXPERTS), fast_dev_run=True).test(project, Data(), verbose=False)
    assert same(project, lm.merge("base.ckpt", EXPERTS, SCORE()).weights)


@fork
@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_has_it(processes):
    class Check(Callback):
        def on_test_start(self, trainer, pl_module):
            assert trainer.world_size == processes
            assert same(pl_module, expected)

    project = write_models()
    expected = lm.merge("base.ckpt", EXPERTS, SCORE()).weights
    trainer = make_trainer(MergeAtSetup("base.ckpt", EXPERTS), Check(), devices=processes, strategy="ddp_fork")
    trainer.test(project, Data(), verbose=False)


@fork
def test_what_is_wrong_stops_all_processes():
    trainer = make_trainer(MergeAtSetup("base.ckpt", ["gone.ckpt"]), devices=2, strategy="ddp_fork")
    with pytest.raises(Exception, match=r"no file or folder gone\.ckpt"):
        trainer.test(write_models(), Data(), verbose=False)
