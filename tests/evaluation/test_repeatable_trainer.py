"""A trainer that is built again with the same arguments."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_merge.evaluation.repeatable_trainer import RepeatableTrainer

CPU = {"accelerator": "cpu", "devices": 1}


class Theirs(Trainer):
    """A project's own trainer, which takes an argument by position."""

    def __init__(self, scanner: str, *args, **kwargs) -> None:
        self.scanner = scanner
        super().__init__(*args, **kwargs)


class Ours(RepeatableTrainer, Theirs):
    """Both."""


def test_all_arguments_are_kept():
    again = Ours("plain", max_epochs=7, limit_val_batches=3, **CPU).again()
    assert type(again) is Ours
    assert (again.scanner, again.max_epochs, again.limit_val_batches) == ("plain", 7, 3)


def test_changes_win():
    again = RepeatableTrainer(max_epochs=7, **CPU).again(max_epochs=2)
    assert again.max_epochs == 2
    assert again.again().max_epochs == 2


def test_it_is_quiet():
    again = RepeatableTrainer(callbacks=[TQDMProgressBar()], **CPU).again([TQDMProgressBar()])
    assert again.progress_bar_callback is None
    assert again.loggers == []
    assert again.checkpoint_callbacks == []


@pytest.mark.parametrize("writes", [True, False])
def test_checkpoints_are_written_only_by_a_given_callback(writes, tmp_path):
    callbacks = [ModelCheckpoint(tmp_path)] if writes else [EarlyStopping("loss")]
    again = RepeatableTrainer(**CPU).again(callbacks)
    assert again.checkpoint_callbacks == (callbacks if writes else [])


def test_given_callbacks_are_those_of_the_call():
    callback, given = EarlyStopping("loss"), []
    given.append(callback)
    trainer = RepeatableTrainer(callbacks=given, **CPU)
    assert trainer.given_callbacks == [callback]
    assert RepeatableTrainer(callbacks=callback, **CPU).given_callbacks == [callback]
    assert RepeatableTrainer(**CPU).given_callbacks == []


def test_given_loggers_are_those_of_the_call(tmp_path):
    logger = CSVLogger(tmp_path)
    assert RepeatableTrainer(logger=logger, **CPU).given_loggers == [logger]
    assert RepeatableTrainer(logger=[logger], **CPU).given_loggers == [logger]
    assert RepeatableTrainer(**CPU).given_loggers == []
