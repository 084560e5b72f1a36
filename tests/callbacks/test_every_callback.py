"""What every callback of the package keeps to: a new one needs a line in ``MAKE``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch.callbacks as lightning_callbacks
import lightning_merge.callbacks
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning_merge.callbacks import (
    CompareMerged,
    FreezeBatchNorm,
    LogAlignment,
    MergeAfterFit,
    MergeAtSetup,
    MergeEveryEpoch,
    RecordStatistics,
    SaveTaskVector,
)
from torch import Tensor

import lightning_merge as lm
from lightning_merge.methods import TIES
from tests.callbacks.project import Data, Project, make_trainer, write_models

EXPERTS = ["expert0.ckpt", "expert1.ckpt"]
MAKE: dict[str, Callable[[], Callback]] = {
    "CompareMerged": lambda: CompareMerged({"expert": "expert0.ckpt"}, stages=["fit", "validate", "test"]),
    "FreezeBatchNorm": FreezeBatchNorm,
    "LogAlignment": lambda: LogAlignment("base.ckpt", EXPERTS),
    "MergeAfterFit": lambda: MergeAfterFit("base.ckpt", EXPERTS, TIES()),
    "MergeAtSetup": lambda: MergeAtSetup("base.ckpt", EXPERTS, TIES()),
    "MergeEveryEpoch": lambda: MergeEveryEpoch("base.ckpt", EXPERTS, TIES()),
    "RecordStatistics": lambda: RecordStatistics(output="statistics.safetensors"),
    "SaveTaskVector": lambda: SaveTaskVector("base.ckpt", output="vector.safetensors"),
}
TRAINS_OTHERWISE = {"FreezeBatchNorm"}
NEEDS_NO_WHOLE_MODEL = {"FreezeBatchNorm"}

every = pytest.mark.parametrize("name", MAKE)
Weights = dict[str, Tensor]


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def fit(*callbacks: Callback, ckpt_path: str | None = None, **arguments) -> Project:
    """A module after a fit that always starts from the same weights and data."""
    project = write_models()
    trainer = make_trainer(*callbacks, **{"enable_checkpointing": True, **arguments})
    trainer.fit(project, Data(), ckpt_path=ckpt_path)
    return project


def test_every_callback_is_here():
    exported = {name: getattr(lightning_merge.callbacks, name) for name in lightning_merge.callbacks.__all__}
    assert {name for name, kind in exported.items() if issubclass(kind, Callback)} == set(MAKE)


@every
def test_a_fit_ends_with_the_weights_it_has_without(name):
    if name not in TRAINS_OTHERWISE:
        assert same(fit(MAKE[name]()).state_dict(), fit().state_dict())


@every
def test_fast_dev_run_tries_everything_and_writes_nothing(name):
    project = write_models()
    before = sorted(Path().rglob("*"))
    trainer = make_trainer(MAKE[name](), fast_dev_run=True)
    trainer.fit(project, Data())
    trainer.validate(project, Data(), verbose=False)
    trainer.test(project, Data(), verbose=False)
    assert sorted(Path().rglob("*")) == before


@every
def test_a_fit_that_is_resumed_ends_as_one_that_was_not_interrupted(name):
    whole = fit(MAKE[name](), max_epochs=3)
    fit(MAKE[name](), ModelCheckpoint("run", filename="last"), max_epochs=1)
    resumed = fit(MAKE[name](), ckpt_path="run/last.ckpt", max_epochs=3)
    assert same(resumed.state_dict(), whole.state_dict())


@every
def test_twice_in_one_trainer(name):
    project, callback = write_models(), MAKE[name]()
    trainer = make_trainer(callback, enable_checkpointing=True, max_epochs=1)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(project, Data())
        trainer.validate(project, Data(), verbose=False)
        trainer.test(project, Data(), verbose=False)
    assert trainer.current_epoch == 2


@every
def test_beside_model_checkpoint_averaging_and_accumulation(name):
    def others() -> list[Callback]:
        average = getattr(lightning_callbacks, "EMAWeightAveraging", None)
        return [ModelCheckpoint(monitor="val/loss"), *([average(decay=0.5)] if average else [])]

    together = fit(MAKE[name](), *others(), accumulate_grad_batches=2)
    if name not in TRAINS_OTHERWISE:
        assert same(together.state_dict(), fit(*others(), accumulate_grad_batches=2).state_dict())


@every
def test_a_model_that_is_divided_is_refused_before_it_is_fitted(name):
    trainer = make_trainer(enable_checkpointing=True)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    project = write_models()

    def refused(stage: str) -> bool:
        try:
            MAKE[name]().setup(trainer, project, stage)
        except lm.MergeError as error:
            return "consolidated checkpoint" in str(error) and name in str(error)
        return False

    assert any(refused(stage) for stage in ("fit", "validate", "test")) == (name not in NEEDS_NO_WHOLE_MODEL)


@every
def test_every_argument_has_a_type_and_a_line_of_help(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(lightning_merge.callbacks, name), "callback", fail_untyped=True)
    arguments = [action for action in parser._actions if action.dest.startswith("callback.")]
    silent = [action.dest for action in arguments if not (action.help or "").strip() or action.help == "%(default)s"]
    assert silent == []


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_works_like_the_callback(name, copied):
    callback = MAKE[name]()
    one, two = fit(callback), fit(copied(MAKE[name]()))
    assert same(one.state_dict(), two.state_dict())
    copied(callback)  # after a fit, too


@every
def test_its_state_survives_a_checkpoint(name):
    callback, other = MAKE[name](), MAKE[name]()
    fit(callback)
    torch.save(callback.state_dict(), "state.pt")
    other.load_state_dict(torch.load("state.pt", weights_only=True))
    assert other.state_dict() == callback.state_dict()
    assert other.state_key == callback.state_key
